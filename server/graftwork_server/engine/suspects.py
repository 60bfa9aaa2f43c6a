"""Inputs under which the engine died: who sends one again and again must not end the engine for all others.

Nobody knows which of the things under way ended an engine. So each of them is a suspect, until it is done once; one
under which two engines in a row have died (three, where they were killed from outside, which memory running out looks
like too) is refused by name for a while.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from graftwork_server.errors import FailedPrecondition
from graftwork_server.messages import Generate, Inspect, Load, PrepareJob, StartJob

DEATHS = 2
DEATHS_IF_KILLED = 3
REFUSED_SECONDS = 600.0
_MOST_REMEMBERED = 10_000


def suspects_of(message: Any, loaded: Collection[str] = ()) -> list[str]:
    """What in `message` could end an engine, by content; `loaded`: digests whose load is done."""
    match message:
        case Inspect():
            return [f"files {message.content or message.path}"]
        case Load():
            return [f"load {message.adapter.digest}"]
        case PrepareJob() | StartJob():
            return [_of_content(msgspec.structs.replace(message, call_id=0))]
        case Generate(adapter=adapter):
            load = [f"load {adapter.digest}"] if adapter is not None and adapter.digest not in loaded else []
            return [*load, _of_content(msgspec.structs.replace(message, id=0))]
    return []


def suspects_among(messages: Iterable[Any], loaded: Collection[str]) -> set[str]:
    """What may have ended an engine under which these were. Files and settings of clients come first: sequences are
    many and long, and hardly ever it, so they are suspects only where there is nothing else."""
    found = {suspect for message in messages for suspect in suspects_of(message, loaded)}
    return {suspect for suspect in found if not suspect.startswith("Generate ")} or found


def _of_content(message: Any) -> str:
    # A kind and a digest: nothing of the request itself is kept.
    return f"{type(message).__name__} {hashlib.sha256(msgspec.msgpack.encode(message)).hexdigest()}"


class Suspects:
    """Deaths by suspect, each forgotten when it is done once, or after ten minutes."""

    def __init__(self) -> None:
        self._deaths: dict[str, tuple[float, float]] = {}
        """Weight of its deaths, 1 being too much, and when the last one was."""

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._deaths)

    def died(self, suspects: Iterable[str], *, killed: bool) -> None:
        """An engine died with these under way; `killed`: by a signal that nothing in it raises."""
        now = time.monotonic()
        for suspect in suspects:
            weight, _ = self._deaths.pop(suspect, (0.0, 0.0))
            self._deaths[suspect] = (weight + 1 / (DEATHS_IF_KILLED if killed else DEATHS), now)
        while len(self._deaths) > _MOST_REMEMBERED:
            del self._deaths[next(iter(self._deaths))]

    def done(self, suspects: Iterable[str]) -> None:
        """These were under way to their end, and the engine lives."""
        for suspect in suspects:
            self._deaths.pop(suspect, None)

    def check(self, suspects: Iterable[str]) -> None:
        """Raises FailedPrecondition (ENGINE_DIED_BEFORE) if engines died too often under one of these."""
        for suspect in suspects:
            weight, last = self._deaths.get(suspect, (0.0, 0.0))
            if time.monotonic() - last > REFUSED_SECONDS:
                self._deaths.pop(suspect, None)
            elif weight > 0.99:
                kind = suspect.split()[0]
                what = {"files": "the check of these files", "load": "the load of this adapter"}.get(
                    kind, "this request"
                )
                raise FailedPrecondition(
                    f"{what} was under way each time when the engine ended of late, so it is refused for "
                    f"{REFUSED_SECONDS / 60:g} minutes; the server's log has the engine's last words",
                    reason="ENGINE_DIED_BEFORE",
                )
