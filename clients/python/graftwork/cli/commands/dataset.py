"""graftwork dataset: check a JSONL file before a job is made of it; list, show and delete what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from graftwork.cli import output
from graftwork.cli.confirm import Yes, delete_by_id
from graftwork.cli.exit_codes import FAILED
from graftwork.cli.options import Address, AsJson, subgroup
from graftwork.cli.progress import upload_bar
from graftwork.cli.session import session
from graftwork.types import DatasetReport

DatasetId: TypeAlias = Annotated[str, typer.Argument(metavar="ID", help="The data set.")]

_SHOWN = 10
"""Problems that are shown one by one; those after them are counted by kind. --json has 100."""

app = subgroup("Data sets: JSONL files to tune on.")


@app.command()
def check(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="F.jsonl", help="The file to check.")],
    max_sequence_tokens: Annotated[
        int, typer.Option("--max-sequence-tokens", help="Where rows are cut; left out: the base model's context.")
    ] = 0,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Check a file: its form, rows, tokens, and bad lines with number and reason. Exits with 1 if invalid."""
    with session(ctx, address, as_json) as client:
        with upload_bar(file.name, as_json) as on_progress:
            report = client.datasets.validate(file, max_sequence_tokens=max_sequence_tokens, on_progress=on_progress)
        if as_json:
            output.emit(report)
        else:
            _print(report, file)
    if not report.valid:
        raise typer.Exit(FAILED)


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False, address: Address = None) -> None:
    """List the stored data sets, newest first."""
    with session(ctx, address, as_json) as client:
        output.listing(
            list(client.datasets.list()),
            ("DATA SET", "NAME", "FORM", "ROWS", "CREATED"),
            lambda d: (d.dataset_id, d.display_name, d.format, f"{d.row_count:,}", d.create_time),
            as_json,
        )


@app.command()
def show(ctx: typer.Context, dataset: DatasetId, as_json: AsJson = False, address: Address = None) -> None:
    """Show a stored data set."""
    with session(ctx, address, as_json) as client:
        found = client.datasets.get(dataset)
        if as_json:
            output.emit(found)
            return
        output.fields(
            (
                ("data set", found.dataset_id),
                ("name", found.display_name),
                ("form", found.format),
                ("rows", f"{found.row_count:,}"),
                ("size", output.size(found.size_bytes)),
                ("created", found.create_time),
            )
        )


@app.command()
def delete(
    ctx: typer.Context, dataset: DatasetId, yes: Yes = False, as_json: AsJson = False, address: Address = None
) -> None:
    """Delete a stored data set. Asks first on a terminal."""
    with session(ctx, address, as_json) as client:
        delete_by_id(client.datasets, dataset, f"delete data set {dataset}?", yes)
        output.say({"dataset_id": dataset}, f"deleted {dataset}", as_json)


def _print(report: DatasetReport, file: Path) -> None:
    for error in report.errors[:_SHOWN]:
        place = f"{file}:{error.line}" if error.line else str(file)
        print(output.readable(f"{place}: {error.reason}"))
    for kind in report.more_errors:
        print(output.readable(f"{kind.count:,} more, the first in line {kind.first_line}: {kind.reason}"))
    hidden = report.error_count - len(report.errors[:_SHOWN]) - sum(kind.count for kind in report.more_errors)
    if hidden > 0:
        print(f"... and {hidden:,} more problems")
    for warning in report.warnings:
        print(output.readable(f"warning: {warning}"))
    if report.errors or report.warnings:
        print()
    output.fields(
        (
            ("valid", report.valid),
            ("form", None if report.format == "unspecified" else report.format),
            ("rows", f"{report.row_count:,}"),
            ("problems", f"{report.error_count:,}"),
            ("tokens", f"{report.total_tokens:,}"),
            ("tokens with loss", f"{report.loss_tokens:,}"),
            ("longest row", f"{report.longest_row_tokens:,} tokens"),
            ("rows cut", f"{report.cut_rows:,}"),
        )
    )
