"""graftwork tune: start, follow and cancel tuning jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graftwork.cli import output
from graftwork.cli.confirm import Yes, delete_by_id
from graftwork.cli.options import Address, AsJson, JobId, subgroup
from graftwork.cli.progress import follow, upload_bar
from graftwork.cli.session import session
from graftwork.client import Client
from graftwork.jobs import TuningJob
from graftwork.transport.uploads import DatasetSource
from graftwork.types import Dataset, TuningEstimate, TuningJobInfo

app = subgroup("Tuning jobs: a data set becomes a new version of an adapter.")


@app.command()
def create(
    ctx: typer.Context,
    strategy: Annotated[str, typer.Option("--strategy", help="How to tune: lora, full, ... (graftwork strategy list)")],
    data: Annotated[Path, typer.Option("--data", metavar="F.jsonl", help="Rows to train on.")],
    adapter: Annotated[str, typer.Option("--adapter", metavar="ID", help="The adapter to publish to.")],
    validation: Annotated[
        Path | None, typer.Option("--validation", metavar="F.jsonl", help="Rows to measure held-out loss on.")
    ] = None,
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            "--validation-fraction", help="Fraction of the rows to keep out of training, 0 to 0.5; left out: chosen."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the strategy, as JSON or text; may be repeated."),
    ] = None,
    new_version: Annotated[
        bool, typer.Option("--new-version", help="If the adapter exists, publish its next version.")
    ] = False,
    load: Annotated[bool, typer.Option("--load/--no-load", help="Load the version once it is published.")] = False,
    follow_it: Annotated[bool, typer.Option("--follow", help="Wait for the end and show how it goes.")] = False,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Upload data and start a job. With --follow and --json: one event per line, the job on the last."""
    wanted: dict[str, Any] = {
        "strategy": strategy,
        "adapter": adapter,
        "config": _config(settings or []),
        "validation_fraction": validation_fraction,
        "new_version": new_version,
    }
    with session(ctx, address, as_json) as client:
        for file in (data, validation):
            if file is not None:
                DatasetSource(file)  # raises where it cannot be read, before anything is sent
        client.tuning.check(**wanted)
        dataset = _upload(client, data, as_json)
        held_out = _upload(client, validation, as_json) if validation is not None else None
        job = client.tuning.create(**wanted, dataset=dataset, validation=held_out, load=load)
        if follow_it:
            if not as_json:
                print(f"job {job.id}", flush=True)
                estimate = job.info.estimate
                output.fields([*_choices(job.info), ("estimate", estimate and _estimate(estimate))])
                sys.stdout.flush()
            _follow(job, 0, as_json)
        else:
            _show(job.info, as_json)


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False, address: Address = None) -> None:
    """List all jobs, newest first."""
    with session(ctx, address, as_json) as client:
        output.listing(
            [job.info for job in client.tuning.list()],
            ("JOB", "STATE", "STRATEGY", "ADAPTER", "STEP", "LOSS", "CREATED"),
            _row,
            as_json,
        )


@app.command()
def show(ctx: typer.Context, job: JobId, as_json: AsJson = False, address: Address = None) -> None:
    """Show a job."""
    with session(ctx, address, as_json) as client:
        _show(client.tuning.get(job).info, as_json)


@app.command()
def watch(
    ctx: typer.Context,
    job: JobId,
    after_sequence: Annotated[
        int, typer.Option("--after-sequence", help="Only events with a higher number; 0: all of them.")
    ] = 0,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Show a job's events until it has ended. With --json: one event per line, the job on the last."""
    with session(ctx, address, as_json) as client:
        _follow(client.tuning.get(job), after_sequence, as_json)


@app.command()
def cancel(ctx: typer.Context, job: JobId, as_json: AsJson = False, address: Address = None) -> None:
    """Cancel a job; it publishes nothing."""
    with session(ctx, address, as_json) as client:
        handle = client.tuning.get(job).cancel()
        output.say(handle.info, f"job {handle.id} {handle.state}", as_json)


@app.command()
def delete(ctx: typer.Context, job: JobId, yes: Yes = False, as_json: AsJson = False, address: Address = None) -> None:
    """Delete a job that has ended, with its events. The version that it published stays. Asks first on a terminal."""
    with session(ctx, address, as_json) as client:
        delete_by_id(client.tuning, job, f"delete job {job} and its events?", yes)
        output.say({"job_id": job}, f"deleted {job}", as_json)


def _row(job: TuningJobInfo) -> tuple[Any, ...]:
    loss = f"{job.progress.loss:.4f}" if job.progress else None
    step = output.step(job.progress)
    return job.job_id, job.state, job.spec.strategy, job.spec.adapter_id, step, loss, job.create_time


def _config(settings: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--set {setting!r}: expected KEY=VALUE")
        if key in config:
            raise typer.BadParameter(f"--set {key} is given twice")
        try:
            config[key] = json.loads(value)
        except ValueError:
            if value.startswith(("[", "{")):
                hint = f"""quote it for the shell, such as --set {key}='["a", "b"]'"""
                raise typer.BadParameter(f"--set {setting}: the value is no JSON; {hint}") from None
            config[key] = value
    return config


def _upload(client: Client, file: Path, as_json: bool) -> Dataset:
    with upload_bar(file.name, as_json) as on_progress:
        return client.datasets.upload(file, on_progress=on_progress)


def _follow(job: TuningJob, after_sequence: int, as_json: bool) -> None:
    """Shows the events and then the result. Raises JobFailedError unless the job succeeded."""
    try:
        follow(job, after_sequence, as_json)
        job.wait()
    except KeyboardInterrupt:
        if not as_json:
            print(f"job {job.id} goes on; see: graftwork tune watch {job.id}", file=sys.stderr)
        raise
    finally:
        if as_json and job.done:
            output.emit(job.info)
    if not as_json:
        _show(job.info, as_json)


def _show(job: TuningJobInfo, as_json: bool) -> None:
    if as_json:
        output.emit(job)
        return
    settings = " ".join(f"{key}={json.dumps(value)}" for key, value in sorted(job.spec.config.items()))
    pairs: list[tuple[str, Any]] = [
        ("job", job.job_id),
        ("state", job.state),
        ("strategy", job.spec.strategy),
        ("adapter", job.spec.adapter_id),
        ("follows", f"{job.spec.adapter_id}@{job.follows_version}" if job.follows_version else None),
        ("data", job.spec.dataset),
        ("settings", settings),
        *_choices(job),
        ("created", job.create_time),
    ]
    if job.error:
        pairs.append(("error", f"{job.error} [{job.error_reason}]" if job.error_reason else job.error))
    if job.progress is not None and not job.done:
        pairs.append(("step", output.step(job.progress)))
        pairs.append(("loss", f"{job.progress.loss:.4f}"))
    if job.result is not None:
        pairs += _result(job)
    elif job.estimate is not None:
        pairs.append(("estimate", _estimate(job.estimate)))
    output.fields(pairs)


def _choices(job: TuningJobInfo) -> list[tuple[str, str]]:
    """What the server chose, and why."""
    return [
        ("chosen", f"{choice.key}={json.dumps(choice.value)}: {choice.reason}")
        for choice in job.choices
        if choice.automatic
    ]


def _estimate(estimate: TuningEstimate) -> str:
    return (
        f"{estimate.total_steps} steps, {estimate.trained_parameters:,} parameters, "
        f"{output.size(estimate.memory_bytes)} more memory, artifact {output.size(estimate.artifact_bytes)}"
    )


def _result(job: TuningJobInfo) -> list[tuple[str, Any]]:
    result = job.result
    assert result is not None
    held_out = result.validation_loss
    return [
        ("version", result.adapter_version),
        ("training loss", f"{result.final_loss:.4f}, the mean of the last tenth of the steps"),
        ("held-out loss", None if held_out is None else f"{held_out:.4f}"),
        ("weights", f"of step {result.published_step}" if result.published_step else None),
        ("trained", f"{result.trained_parameters:,} parameters in {output.duration(result.train_ms)}"),
        ("peak memory", output.size(result.peak_memory_bytes)),
        ("artifact", output.size(result.artifact_bytes)),
    ]
