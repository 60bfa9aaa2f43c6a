"""Sequences as the front sees them: outputs come in from the engine, each has one reader that takes them out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from graftwork_server.errors import GraftworkServerError, ResourceExhausted, from_body
from graftwork_server.messages import SequenceOutput

MAX_WAITING_ENTRIES = 65_536
"""Most tokens, alternatives in log probabilities counted too, that wait for a reader who does not read."""

MESSAGES_PER_SECOND = 2000
"""About how many messages all readers together are given. One through gRPC costs front and client some 50 us each,
whatever is in it: many streams of a small model would take more of a CPU for messages than for tokens."""


class OutputStream:
    """Outputs of one sequence between the engine's frames and its one reader; bounded, on one event loop."""

    __slots__ = ("_begun", "_entries", "_error", "_waiting", "_wakeup", "ended")

    def __init__(self) -> None:
        self._waiting: list[SequenceOutput] = []
        self._begun = False
        self._entries = 0
        self._wakeup: asyncio.Future[None] | None = None
        self._error: GraftworkServerError | None = None
        self.ended = False
        """True once the reader took the last output or the engine's error: there is nothing to cancel."""

    def push(self, output: SequenceOutput) -> None:
        """Takes an output of the engine; one that nobody fetches in time makes the reader fail (SLOW_CONSUMER).

        The first and the last output wake the reader at once, others when `wake` is called.
        """
        self._waiting.append(output)
        self._entries += len(output.token_ids)
        if output.logprobs:
            self._entries += sum(len(entry.top) for entry in output.logprobs)
        if self._entries > MAX_WAITING_ENTRIES:
            self._waiting.clear()
            self.fail(
                ResourceExhausted(
                    "the client read too slowly, and too many tokens were waiting for it", reason="SLOW_CONSUMER"
                )
            )
        if output.finish or not self._begun:
            self.wake()
        self._begun = True

    def fail(self, error: GraftworkServerError) -> None:
        """The reader gets `error` next; the first one stays."""
        self._error = self._error or error
        self.wake()

    async def next(self) -> SequenceOutput:
        """Everything that came since the last call, as one output.

        Raises what `fail` was given, or the engine's error.
        """
        while not self._waiting and self._error is None:
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        # A stream that broke never hands out its rest: an error must not look like a late success.
        if self._error is not None:
            raise self._error
        waiting, self._waiting, self._entries = self._waiting, [], 0
        output = waiting[0] if len(waiting) == 1 else merge(waiting)
        self.ended = bool(output.finish)
        if output.finish == "error":
            raise from_body(output.error) if output.error else ValueError("an error without a body")
        return output

    def wake(self) -> None:
        """Lets the reader have what waits for it."""
        if self._wakeup is not None and not self._wakeup.done() and (self._waiting or self._error is not None):
            self._wakeup.set_result(None)


class Pace:
    """Wakes the readers of all streams together, no more often than MESSAGES_PER_SECOND allows.

    With few streams, or a model whose steps take longer than that, every step's tokens are passed on at once.
    """

    def __init__(self) -> None:
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def wake(self, streams: Mapping[int, OutputStream]) -> None:
        """Wakes them now, or as soon as it is time; what comes until then joins in."""
        loop = asyncio.get_running_loop()
        if self._timer is None and loop.time() < self._due:
            self._timer = loop.call_at(self._due, self._wake, streams)
        elif self._timer is None:
            self._wake(streams)

    def _wake(self, streams: Mapping[int, OutputStream]) -> None:
        self._timer = None
        self._due = asyncio.get_running_loop().time() + len(streams) / MESSAGES_PER_SECOND
        for stream in streams.values():
            stream.wake()


def merge(outputs: list[SequenceOutput]) -> SequenceOutput:
    """Consecutive outputs of one sequence as one."""
    last = outputs[-1]
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    return SequenceOutput(
        id=last.id,
        token_ids=[token for output in outputs for token in output.token_ids],
        finish=last.finish,
        logprobs=logprobs if any(output.logprobs is not None for output in outputs) else None,
        prompt_logprobs=outputs[0].prompt_logprobs,
        error=last.error,
        cached_tokens=outputs[0].cached_tokens,
    )
