"""Sequences as the front sees them: outputs come in from the engine, each has one reader that takes them out."""

from __future__ import annotations

import asyncio

from graftwork_server.errors import GraftworkServerError, ResourceExhausted, from_body
from graftwork_server.wire.engine import SequenceOutput, merge

MAX_WAITING_ENTRIES = 65_536
"""Most tokens, alternatives in log probabilities counted too, that wait for a reader who does not read."""


class OutputStream:
    """Outputs of one sequence between the engine's frames and its one reader; bounded, on one event loop."""

    __slots__ = ("_entries", "_error", "_waiting", "_wakeup", "ended")

    def __init__(self) -> None:
        self._waiting: list[SequenceOutput] = []
        self._entries = 0
        self._wakeup: asyncio.Future[None] | None = None
        self._error: GraftworkServerError | None = None
        self.ended = False
        """True once the reader took the last output or the engine's error: there is nothing to cancel."""

    def push(self, output: SequenceOutput) -> None:
        """Takes an output of the engine; one that nobody fetches in time makes the reader fail (SLOW_CONSUMER)."""
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
        self._wake()

    def fail(self, error: GraftworkServerError) -> None:
        """The reader gets `error` next; the first one stays."""
        self._error = self._error or error
        self._wake()

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
        output = merge(waiting)
        self.ended = bool(output.finish)
        if output.finish == "error":
            raise from_body(output.error) if output.error else ValueError("an error without a body")
        return output

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)
