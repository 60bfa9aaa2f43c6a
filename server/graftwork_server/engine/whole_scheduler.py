"""What runs in the next step of an encoder: whole sequences, in order of arrival, under a token budget.

An encoder's token sees those behind it too, so a sequence cannot be cut into chunks; and it ends in the step that it
runs in, so there are no blocks to hold and nobody to preempt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from graftwork_server.engine.adapter_pool import AdapterPool
from graftwork_server.engine.sequence import ScheduledChunk, Sequence


class WholeScheduler:
    """Scheduler's counterpart, with the same methods."""

    def __init__(
        self,
        adapters: AdapterPool,
        request_load: Callable[[Sequence], None],
        *,
        max_sequences: int,
        max_step_tokens: int,
    ) -> None:
        """`request_load` is called for a waiting sequence whose adapter is not loaded, in every step anew. A sequence
        of more than max_step_tokens runs alone."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0
        """Always 0: nothing is kept of a sequence."""
        self._adapters = adapters
        self._request_load = request_load
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The sequences of the next step; empty if nothing can run now. Adapters that still load are passed by, unless
        their load waits for room: then nobody newer is let in, so that leases end."""
        chunks: list[ScheduledChunk] = []
        budget = self._max_step_tokens
        for sequence in list(self.waiting):
            count = len(sequence.tokens)
            if len(chunks) == self._max_sequences or (chunks and count > budget):
                break
            if sequence.digest is not None:
                sequence.adapter = self._adapters.lease(sequence.digest)
                if sequence.adapter is None:
                    self._request_load(sequence)
                    if self._adapters.waits_for_room:
                        break
                    continue
            self.waiting.remove(sequence)
            self.running.append(sequence)
            chunks.append(ScheduledChunk(sequence, 0, count))
            self.prompt_tokens += count
            budget -= count
        return chunks

    def waiting_for(self, digest: str) -> list[Sequence]:
        """All sequences of an adapter that wait."""
        return [sequence for sequence in self.waiting if sequence.digest == digest]

    def waited_for(self) -> set[str]:
        """Digests of the adapters of waiting sequences."""
        return {sequence.digest for sequence in self.waiting if sequence.digest is not None}

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its lease back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
            sequence.adapter = None
