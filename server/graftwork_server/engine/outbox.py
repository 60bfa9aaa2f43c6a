"""What the engine has to say, on its way to the front: sent by a thread of its own, tokens of many steps together."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from graftwork_server.errors import ErrorBody, InvalidArgument
from graftwork_server.wire.engine import Reply, Result, SequenceOutput, StepOutputs, instead_of, merge
from graftwork_server.wire.frames import encode_frame

log = logging.getLogger("graftwork.engine")

_MESSAGES_PER_CORE = 250
"""One costs front and client together some 100 us, whatever is in it, and as much again of a step on the CPU, whose
threads wait for the one that lost its core: so many are a twentieth of the machine."""
_MOST_MESSAGES = 5000
"""About half of what the front's one event loop can send."""


def default_messages_per_second() -> int:
    """What this machine can spare beside the tokens themselves."""
    return min(_MESSAGES_PER_CORE * len(os.sched_getaffinity(0)), _MOST_MESSAGES)


class Outbox:
    """Messages for the front, in order. Only outputs of a sequence between its first and its last may be held back, to
    be sent as one: of all sequences together there are at most about `messages_per_second` of those.

    Each becomes a message to a client, which costs front and client time whatever is in it. What is held goes out with
    the outputs of a later step, never between steps: with few sequences, or a model whose steps take long, every step's
    outputs are sent at once.

    A message that cannot be encoded becomes an error for who waits for it, and for nobody else. `broken` is called with
    a sequence to which that happened, in the sending thread: it need not go on. messages_per_second 0: what this
    machine can spare.
    """

    def __init__(
        self, connection: socket.socket, messages_per_second: int, broken: Callable[[int], None] = lambda _: None
    ) -> None:
        self._connection = connection
        self._broken = broken
        self._seconds_each = 1 / (messages_per_second or default_messages_per_second())
        self._changed = threading.Condition()
        self._ready: list[Any] = []
        """To be sent now."""
        self._begun: set[int] = set()
        """Sequences whose first output was sent, and their last was not."""
        self._held: dict[int, list[SequenceOutput]] = {}
        """Outputs that wait until `_due`, by sequence."""
        self._due = 0.0
        self._published, self._step_seconds = 0.0, 0.0
        """When outputs last came, and how far apart they come of late."""
        self._closed = False

    def send(self, message: Any) -> None:
        """Sends any message but outputs."""
        with self._changed:
            self._ready.append(message)
            self._changed.notify()

    def publish(self, outputs: Iterable[SequenceOutput]) -> None:
        """Sends outputs; first and last ones of a sequence at once, and with the last whatever was held back of it."""
        now: list[SequenceOutput] = []
        with self._changed:
            self._look_at_clock()
            was_empty = not self._held
            for output in outputs:
                if output.finish:
                    self._begun.discard(output.id)
                    now.append(merge([*self._held.pop(output.id, ()), output]))
                elif output.id in self._begun:
                    self._held.setdefault(output.id, []).append(output)
                else:
                    self._begun.add(output.id)
                    now.append(output)
            if now:
                self._ready.append(StepOutputs(now))
            # While it holds something, the sending thread wakes by itself.
            if now or was_empty:
                self._changed.notify()

    def reply(self, call_id: int, result: Result | ErrorBody) -> None:
        """Answers a call of the front."""
        if isinstance(result, ErrorBody):
            self.send(Reply(call_id=call_id, error=result))
        else:
            self.send(Reply(call_id=call_id, result=result))

    def forget(self, sequence_id: int) -> None:
        """Nothing more of a sequence that was cancelled is sent."""
        with self._changed:
            self._begun.discard(sequence_id)
            self._held.pop(sequence_id, None)

    def close(self) -> None:
        """Lets `run` return once everything was sent."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        """Sends until `close`. Raises OSError when the connection is lost."""
        while (messages := self._next()) is not None:
            self._connection.sendall(b"".join(self._frames(message) for message in messages))

    def _frames(self, message: Any) -> bytes:
        try:
            return encode_frame(message)
        except InvalidArgument as error:
            log.error("%s", error.message)
            instead = instead_of(message, error.body())
            if isinstance(message, StepOutputs) and len(message.outputs) == 1:
                self._broken(message.outputs[0].id)
            return b"".join(self._frames(other) for other in instead)

    def _next(self) -> list[Any] | None:
        """What is to be sent now, waited for; None at the end."""
        with self._changed:
            while True:
                wait = max(0.0, self._due - time.monotonic()) if self._held else None
                if wait == 0.0 or self._closed:
                    self._release()
                if self._ready:
                    ready, self._ready = self._ready, []
                    return ready
                if self._closed:
                    return None
                self._changed.wait(wait)

    def _look_at_clock(self) -> None:
        """Follows the time between steps. A pause counts as a second: outputs after it are not held."""
        published, self._published = self._published, time.monotonic()
        seconds = min(self._published - published, 1.0)
        self._step_seconds = 0.8 * self._step_seconds + 0.2 * seconds if self._step_seconds else seconds

    def _release(self) -> None:
        if self._held:
            steps = int(len(self._held) * self._seconds_each / max(self._step_seconds, 1e-6))
            # Half a step before the last of them, whose outputs then go out as they come.
            self._due = time.monotonic() + (steps - 0.5) * self._step_seconds if steps > 1 else 0.0
            self._ready.append(StepOutputs([merge(outputs) for outputs in self._held.values()]))
            self._held = {}
