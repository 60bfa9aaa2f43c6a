"""graftwork dataset: check a JSONL file before a job is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson, subgroup
from graftwork.cli.progress import upload_bar
from graftwork.cli.session import FAILED, session
from graftwork.types import DatasetReport

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
    """Check a file: its form, rows, tokens, and each bad line with its number and reason. Exits with 1 if invalid."""
    with session(ctx, address, as_json) as client:
        with upload_bar(file.name, as_json) as on_progress:
            report = client.datasets.validate(file, max_sequence_tokens=max_sequence_tokens, on_progress=on_progress)
        if as_json:
            output.emit(report)
        else:
            _print(report, file)
    if not report.valid:
        raise typer.Exit(FAILED)


def _print(report: DatasetReport, file: Path) -> None:
    for error in report.errors:
        place = f"{file}:{error.line}" if error.line else str(file)
        print(output.readable(f"{place}: {error.reason}"))
    hidden = report.error_count - len(report.errors)
    if hidden > 0:
        print(f"... and {hidden} more problems")
    for warning in report.warnings:
        print(output.readable(f"warning: {warning}"))
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
