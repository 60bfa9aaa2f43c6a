"""What runs in the next step: decodes first, then prefills in order of arrival under a token budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from graftwork_server.engine.adapter_pool import AdapterPool
from graftwork_server.engine.kv_cache import BlockPool
from graftwork_server.engine.sequence import ScheduledChunk, Sequence

_PROMPT_LOGPROBS_CHUNK = 256
"""Tokens per step of a sequence that needs logits at each of them: a chunk's logits are [tokens, vocabulary] floats."""


class Scheduler:
    """Waiting and running sequences, and the blocks and leases that running ones hold."""

    def __init__(
        self,
        blocks: BlockPool,
        adapters: AdapterPool,
        request_load: Callable[[Sequence], None],
        *,
        max_sequences: int,
        max_step_tokens: int,
    ) -> None:
        """`request_load` is called for a waiting sequence whose adapter is not loaded, in every step anew."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._blocks = blocks
        self._adapters = adapters
        self._request_load = request_load
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step; empty if nothing can run now. Their blocks are taken."""
        budget = self._max_step_tokens
        chunks: list[ScheduledChunk] = []
        for sequence in list(self.running):
            if len(sequence.tokens) - sequence.computed == 1 and self._ensure_blocks(sequence):
                chunks.append(ScheduledChunk(sequence, sequence.computed, 1))
                budget -= 1
        # A sequence that was scheduled first may have been preempted for one after it.
        chunks = [chunk for chunk in chunks if chunk.sequence.block_table]
        for sequence in self.running:
            if len(sequence.tokens) - sequence.computed > 1 and budget > 0:
                budget -= self._prefill(sequence, budget, chunks)
        self._admit(budget, chunks)
        return chunks

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees what it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)

    def _admit(self, budget: int, chunks: list[ScheduledChunk]) -> None:
        """Moves waiting sequences to running, oldest first.

        One whose adapter is still loading is passed by. Where its load waits for room, the pool gives no new leases on
        an adapter that is to make room for it, so that those leases end and it gets its turn.
        """
        for sequence in list(self.waiting):
            if len(self.running) >= self._max_sequences or budget <= 0:
                return
            if sequence.digest is not None:
                sequence.adapter = self._adapters.lease(sequence.digest)
                if sequence.adapter is None:
                    self._request_load(sequence)
                    continue
            if not self._blocks.extend(sequence.block_table, len(sequence.tokens)):
                self._free(sequence)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            budget -= self._prefill(sequence, budget, chunks)

    def _prefill(self, sequence: Sequence, budget: int, chunks: list[ScheduledChunk]) -> int:
        count = min(len(sequence.tokens) - sequence.computed, budget)
        if sequence.wants_prompt_logprobs:
            count = min(count, _PROMPT_LOGPROBS_CHUNK)
        chunks.append(ScheduledChunk(sequence, sequence.computed, count))
        return count

    def _ensure_blocks(self, sequence: Sequence) -> bool:
        """Blocks for the sequence's newest token, preempting the newest sequences while there are none. False if the
        sequence itself was preempted."""
        if not sequence.block_table:
            return False
        while not self._blocks.extend(sequence.block_table, len(sequence.tokens)):
            victim = self.running[-1]
            self.running.remove(victim)
            self._free(victim)
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False
        return True

    def _free(self, sequence: Sequence) -> None:
        """Gives blocks and lease back. What was computed is computed again if the sequence runs later."""
        self._blocks.release(sequence.block_table)
        sequence.computed = 0
        sequence.prompt_logprobs.clear()
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
            sequence.adapter = None
