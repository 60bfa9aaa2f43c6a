"""Progress on a terminal: bars for uploads and tuning jobs. rich is imported only where a bar is drawn."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graftwork.cli.output import duration, emit
from graftwork.jobs import TuningJob
from graftwork.types import TuningEvent, TuningProgress

if TYPE_CHECKING:
    from rich.progress import Progress

_LINES = 20
"""Steps of a job that a terminal gets a line for."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE_CHARACTERS = 50
_MOST_POINTS = 5_000


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


class LossCurve:
    """Training and held-out losses of the steps that were seen, in bounded memory."""

    def __init__(self) -> None:
        self._training: list[tuple[int, float]] = []
        self._held_out: list[tuple[int, float]] = []

    def watch(self, events: Iterator[TuningEvent]) -> Iterator[TuningEvent]:
        """The same events, noted on their way."""
        for event in events:
            if event.progress is not None:
                self._note(self._training, event.progress.step, event.progress.loss)
            if event.evaluation is not None:
                self._note(self._held_out, event.evaluation.step, event.evaluation.loss)
            yield event

    def lines(self) -> list[str]:
        """A line for each of the two that has two values or more; none where the terminal cannot show them."""
        shown = []
        encoding = (sys.stdout.encoding or "").lower().replace("-", "")
        for name, points in (("loss", self._training), ("held-out loss", self._held_out)):
            values = [value for _, value in points]
            if len(values) > 1 and encoding.startswith("utf"):
                ends = f"{values[0]:.4f} {_sparkline(values)} {values[-1]:.4f}"
                shown.append(f"{name.ljust(13)}  {ends}  (steps {points[0][0]} to {points[-1][0]})")
        return shown

    @staticmethod
    def _note(points: list[tuple[int, float]], step: int, value: float) -> None:
        if not math.isfinite(value):
            return
        # Of many steps every second is kept, then every fourth, ...; the newest one always is.
        apart = points[1][0] - points[0][0] if len(points) > 1 else 0
        if len(points) > 2 and points[-1][0] - points[-2][0] < apart:
            points[-1] = (step, value)
        else:
            points.append((step, value))
        if len(points) > _MOST_POINTS:
            del points[1::2]


def _sparkline(values: Sequence[float]) -> str:
    """At most _CURVE_CHARACTERS blocks, each as high as the mean of its share of the values."""
    count = min(len(values), _CURVE_CHARACTERS)
    borders = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(borders)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


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
            return f"step {event.progress.step}/{event.progress.total_steps}  {_facts(event.progress)}"
        case "evaluation":
            assert event.evaluation is not None
            return f"step {event.evaluation.step}  held-out loss {event.evaluation.loss:.4f}"
        case "checkpoint":
            return f"checkpoint at step {event.checkpoint_step}"
        case "message":
            return " ".join((event.message or "").split())
        case _:
            return f"event {event.sequence}"
