"""The losses of a job as a line of blocks."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence

from graftwork.types import TuningEvent

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE_CHARACTERS = 50
_MOST_POINTS = 5_000


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
                ends = f"{values[0]:.4f} {sparkline(values)} {values[-1]:.4f}"
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


def sparkline(values: Sequence[float]) -> str:
    """At most _CURVE_CHARACTERS blocks, each as high as the mean of its share of the values."""
    count = min(len(values), _CURVE_CHARACTERS)
    borders = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(borders)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)
