"""Inputs under which the engine died: who sends one again and again must not end the engine for all others.

Nobody knows which of the things under way ended an engine. So each of them is a suspect, until it is done once; one
under which two engines in a row have died (three, where they were killed from outside, which memory running out looks
like too) is refused by name for a while.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Collection
from typing import Any

import msgspec

from graftwork_server.errors import FailedPrecondition
from graftwork_server.wire.engine import Generate, Inspect, Load
from graftwork_server.wire.tuning import PrepareJob, StartJob

DEATHS = 2
DEATHS_IF_KILLED = 3
REFUSED_SECONDS = 600.0
LEFT_SECONDS = 10.0
"""So long a sequence that was cancelled may still be what ends the engine: its load goes on, for one."""
MOST_LEFT = 256
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


def _of_content(message: Any) -> str:
    # A kind and a digest: nothing of the request itself is kept.
    return f"{type(message).__name__} {hashlib.sha256(msgspec.msgpack.encode(message)).hexdigest()}"


class InFlight:
    """What the engine has not answered to its end, and deaths by suspect: each is forgotten when it is done once, or
    after ten minutes."""

    def __init__(self) -> None:
        self._messages: dict[int, Any] = {}
        self._left: deque[tuple[float, Any]] = deque(maxlen=MOST_LEFT)
        """Sequences that were cancelled of late, of which the engine says nothing more."""
        self._deaths: dict[str, tuple[float, float]] = {}
        """Weight of its deaths, 1 being too much, and when the last one was."""

    def check(self, message: Any, loaded: Collection[str]) -> None:
        """Raises FailedPrecondition (ENGINE_DIED_BEFORE) if engines died too often under what is in `message`."""
        for suspect in suspects_of(message, loaded) if self._deaths else ():
            weight, last = self._deaths.get(suspect, (0.0, 0.0))
            if time.monotonic() - last > REFUSED_SECONDS:
                self._deaths.pop(suspect, None)
            elif weight > 0.99:
                names = {"files": "the check of these files", "load": "the load of this adapter"}
                what = names.get(suspect.split()[0], "this request")
                raise FailedPrecondition(
                    f"{what} was under way each time when the engine ended of late, so it is refused for "
                    f"{REFUSED_SECONDS / 60:g} minutes; the server's log has the engine's last words",
                    reason="ENGINE_DIED_BEFORE",
                )

    def begin(self, id: int, message: Any) -> None:
        """`message` was sent."""
        self._messages[id] = message

    def done(self, id: int) -> None:
        """The engine answered to the end, whatever it said: it lives."""
        message = self._messages.pop(id, None)
        for suspect in suspects_of(message) if self._deaths else ():
            self._deaths.pop(suspect, None)

    def leave(self, id: int) -> None:
        """Nobody waits for it any more; what it began in the engine may still go on."""
        message = self._messages.pop(id, None)
        if message is not None:
            self._left.append((time.monotonic(), message))

    def died(self, loaded: Collection[str], *, killed: bool) -> bool:
        """The engine died; true if something of a client may have done it. `killed`: by a signal that nothing in it
        raises; `loaded`: what was."""
        now = time.monotonic()
        messages = [*self._messages.values(), *(message for when, message in self._left if now - when < LEFT_SECONDS)]
        self._messages.clear()
        self._left.clear()
        found = {suspect for message in messages for suspect in suspects_of(message, loaded)}
        # Sequences are many and long, and hardly ever it: they are suspects only where there is nothing else.
        suspects = {suspect for suspect in found if not suspect.startswith("Generate ")} or found
        for suspect in suspects:
            weight, _ = self._deaths.pop(suspect, (0.0, 0.0))
            self._deaths[suspect] = (weight + 1 / (DEATHS_IF_KILLED if killed else DEATHS), now)
        while len(self._deaths) > _MOST_REMEMBERED:
            del self._deaths[next(iter(self._deaths))]
        return bool(suspects)
