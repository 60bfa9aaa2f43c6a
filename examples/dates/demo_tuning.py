"""A tuning job as one watches it: a bar on a terminal, a line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from demo_server import DemoError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import graftwork

_LINE_SECONDS = 10


def follow(job: graftwork.TuningJob) -> graftwork.TuningResult:
    """Shows a job's events until it has ended and returns its result. Raises DemoError if it failed."""
    if sys.stdout.isatty():
        _draw(job)
    else:
        for line in _lines(job.events()):
            print(f"    {line}", flush=True)
    try:
        return job.wait()
    except graftwork.JobFailedError as error:
        raise DemoError(f"the tuning job did not succeed: {error}") from error


def _lines(events: Iterator[graftwork.TuningEvent]) -> Iterator[str]:
    due = 0.0
    for event in events:
        if event.progress is not None:
            last = event.progress.step == event.progress.total_steps
            if not last and time.monotonic() < due:
                continue
            due = time.monotonic() + _LINE_SECONDS
            yield f"step {event.progress.step}/{event.progress.total_steps}  {_facts(event.progress)}"
        elif line := _words(event):
            yield line


def _draw(job: graftwork.TuningJob) -> None:
    columns = (
        TextColumn("    {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(job.info.spec.strategy, total=None, facts=job.state)
        for event in job.events():
            if event.progress is not None:
                bar.update(
                    task,
                    completed=event.progress.step,
                    total=event.progress.total_steps,
                    facts=_facts(event.progress),
                )
            elif line := _words(event):
                bar.console.print(f"    {line}", markup=False, highlight=False)


def _facts(progress: graftwork.TuningProgress) -> str:
    return f"loss {progress.loss:.3f}  {progress.tokens_per_second:.0f} tokens/s"


def _words(event: graftwork.TuningEvent) -> str:
    """What is worth a line besides progress; checkpoints are not."""
    if event.evaluation is not None:
        return f"held-out loss after step {event.evaluation.step}: {event.evaluation.loss:.3f}"
    return event.state or event.message or ""
