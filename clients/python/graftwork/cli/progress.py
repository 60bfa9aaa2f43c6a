"""Progress on a terminal: bars for uploads and tuning jobs. rich is imported only where a bar is drawn."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graftwork.cli.loss_curve import LossCurve
from graftwork.cli.output import duration, emit, step
from graftwork.jobs import TuningJob
from graftwork.types import TuningEvent, TuningProgress

if TYPE_CHECKING:
    from rich.progress import Progress

_LINES = 20
"""Steps of a job that a terminal gets a line for."""


@contextmanager
def upload_bar(label: str, as_json: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callback that draws a bar of the bytes sent on stderr; None where no terminal or --json."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(label), total=None)

        def update(sent: int, total: int) -> None:
            if sent < total:
                bar.update(task, description=escape(label), completed=sent, total=total)
            else:  # the server has it all, and may have much to check
                bar.update(task, description=f"{escape(label)}: sent, is being checked", completed=sent, total=None)

        yield update


def follow(job: TuningJob, after_sequence: int, as_json: bool) -> None:
    """Prints a job's events until it has ended: JSON lines, or lines of text and then the loss as a curve.

    On a terminal a bar moves below the lines, and of the steps one in twenty is printed.
    """
    events = job.events(after_sequence)
    if as_json:
        for event in events:
            emit(event)
        return
    curve = LossCurve()
    if sys.stdout.isatty():
        _draw(job, curve.watch(events))
    else:
        for event in curve.watch(events):
            print(_line(event), flush=True)
    for line in curve.lines():
        print(line, flush=True)


def _draw(job: TuningJob, events: Iterator[TuningEvent]) -> None:
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    next_step = 1
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(escape(job.info.spec.adapter_id), total=None, facts=job.state)
        for event in events:
            progress = event.progress
            if progress is not None:
                _advance(bar, task, progress)
            elif event.state is not None:
                bar.update(task, facts=event.state)
            if progress is None or progress.step >= next_step or progress.step == progress.total_steps:
                bar.console.print(_line(event), markup=False, highlight=False)
            if progress is not None and progress.step >= next_step:
                next_step = progress.step + max(progress.total_steps // _LINES, 1)


def _advance(bar: Progress, task: object, progress: TuningProgress) -> None:
    bar.update(
        task,  # type: ignore[arg-type]  # rich's TaskID, which is not worth an import at run time
        completed=progress.step,
        total=progress.total_steps,
        facts=_facts(progress),
    )


def _facts(progress: TuningProgress) -> str:
    loss = f"{progress.loss:.4f}" if math.isfinite(progress.loss) else str(progress.loss)
    return (
        f"loss {loss}  lr {progress.learning_rate:.2e}  {progress.tokens_per_second:.0f} tok/s  "
        f"ETA {duration(progress.eta_ms)}"
    )


def _line(event: TuningEvent) -> str:
    match event.kind:
        case "state":
            return f"{event.state}"
        case "progress":
            assert event.progress is not None
            return f"step {step(event.progress)}  {_facts(event.progress)}"
        case "evaluation":
            assert event.evaluation is not None
            return f"step {event.evaluation.step}  held-out loss {event.evaluation.loss:.4f}"
        case "checkpoint":
            return f"checkpoint at step {event.checkpoint_step}"
        case "message":
            return " ".join((event.message or "").split())
        case _:
            return f"event {event.sequence}"
