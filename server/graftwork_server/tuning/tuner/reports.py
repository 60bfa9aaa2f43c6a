"""What a run has reported, kept beside its checkpoints: what the front did not get to write down is said again.

    <folder>/step-00000050.json   the reports since the checkpoint before, durable before that of step 50 is

A front that is killed has not written the newest reports, and a run that goes on does not make those from before its
checkpoint again. So they are part of it. The front knows a report by its step, and keeps each once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from graftwork_server.durable import sync, write_json
from graftwork_server.wire.tuning import Checkpointed, Evaluated, Progress, TunerEvent


class Reports:
    """The reports of one run. `reported_step`: of the newest one that the front has; None: it needs none again."""

    def __init__(self, folder: Path, send: Callable[[TunerEvent], None], reported_step: int | None = None) -> None:
        self._folder = folder
        self._send = send
        self._reported_step = reported_step
        self._newest: list[Progress | Evaluated] = []

    def send(self, event: TunerEvent) -> None:
        """Notes a report, and sends it."""
        if isinstance(event, Progress | Evaluated):
            self._newest.append(event)
        self._send(event)

    def keep(self, step: int) -> None:
        """Makes the reports since the checkpoint before durable, for the one of `step`, which is made now."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"step-{step:08}.json", {"reports": [_plain(event) for event in self._newest]})
        sync(self._folder)
        self._newest = []

    def go_on(self, step: int) -> None:
        """Says again what the front may not have of the reports up to the checkpoint of `step`, that included."""
        if self._reported_step is None or not step:
            return
        for event in self._read(step):
            if _step(event) >= self._reported_step:
                self._send(event)
        self._send(Checkpointed(step=step))

    def _read(self, until: int) -> Iterator[Progress | Evaluated]:
        for path in sorted(self._folder.glob("step-" + "[0-9]" * 8 + ".json")):
            # A later one is of a checkpoint that was not finished, or is damaged: its steps are made again.
            if int(path.stem.removeprefix("step-")) <= until:
                for plain in json.loads(path.read_bytes())["reports"]:
                    yield _report(plain)


def _step(event: Progress | Evaluated) -> int:
    return event.step if isinstance(event, Evaluated) else event.progress.step


def _plain(event: Progress | Evaluated) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(event)
    if isinstance(event, Evaluated) and not math.isfinite(event.loss):
        plain["loss"] = None  # JSON knows no NaN
    return plain


def _report(plain: dict[str, Any]) -> Progress | Evaluated:
    if plain.get("loss", 0) is None:
        plain["loss"] = math.nan
    return msgspec.convert(plain, Progress | Evaluated)
