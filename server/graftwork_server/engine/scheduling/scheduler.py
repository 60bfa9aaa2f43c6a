"""What runs in the next step, and who ends with it and why.

Decodes first, then prefills under a token budget, then whose turn it is to begin. A step costs what runs and what
begins, not what waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from graftwork_server.engine.cache.block_pool import BlockPool
from graftwork_server.engine.scheduling import ends
from graftwork_server.engine.scheduling.admission import Admission
from graftwork_server.engine.scheduling.sequence import Sampled, ScheduledChunk, Sequence
from graftwork_server.errors import ErrorBody
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.wire.engine import SequenceOutput

_PROMPT_LOGPROBS_CHUNK = 256
"""Tokens per step of a sequence that needs logits at each of them: a chunk's logits are [tokens, vocabulary] floats."""


@dataclass(frozen=True)
class Step:
    """What the scheduler decided for one step."""

    chunks: list[ScheduledChunk]
    """To be run."""
    refused: list[SequenceOutput]
    """Last outputs of sequences whose adapter cannot answer them."""


class Scheduler:
    """The sequences, and the blocks and leases that those hold which run."""

    def __init__(
        self,
        admission: Admission,
        blocks: BlockPool,
        *,
        max_sequences: int,
        max_step_tokens: int,
        clear_blocks: Callable[[SequenceOf[int]], None],
        eos_token_ids: Collection[int] = (),
        prefix_cache: bool = True,
        rope_borders: SequenceOf[int] = (),
    ) -> None:
        """clear_blocks: makes the content of blocks harmless before they go to others. eos_token_ids: of the model.
        prefix_cache: full blocks are found again by sequences that begin with the same tokens. rope_borders: of the
        base; a sequence whose length passes one is computed anew."""
        self.sequences: dict[int, Sequence] = {}
        """By request id, waiting or running."""
        self.running: list[Sequence] = []
        self.eos_token_ids = frozenset(eos_token_ids)
        self._admission = admission
        self._blocks = blocks
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens
        self._clear_blocks = clear_blocks
        self._prefix_cache = prefix_cache
        self._rope_borders = rope_borders

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        self.sequences[sequence.id] = sequence
        self._admission.add(sequence)

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence without an answer; unknown ids are ignored."""
        sequence = self.sequences.pop(sequence_id, None)
        if sequence is not None:
            self.finish(sequence)

    def fail(self, sequence: Sequence, error: ErrorBody) -> SequenceOutput:
        """Ends a sequence with an error."""
        return self._end(sequence, SequenceOutput(sequence.id, [], "error", error=error))

    def schedule(self) -> Step:
        """Decides the next step; it has no chunks if nothing can run now."""
        chunks = self._chunks()
        refused = [chunk.sequence for chunk in chunks if chunk.sequence.is_refused]
        if refused:
            chunks = [chunk for chunk in chunks if not chunk.sequence.is_refused]
        return Step(chunks, [self.fail(sequence, ends.refused(sequence)) for sequence in refused])

    def publish(self, sampled: SequenceOf[Sampled]) -> list[SequenceOutput]:
        """Takes what a step made of its chunks; what the sequences send, and end with."""
        outputs = (self._output(one) for one in sampled)
        return [output for output in outputs if output is not None]

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees what it holds."""
        if not self._admission.remove(sequence):
            self.running.remove(sequence)
        self._forget_computed(sequence)
        self._admission.ended(sequence)

    def _chunks(self) -> list[ScheduledChunk]:
        """Blocks of the chunks are taken, and the full ones among them are found by others from now on: a step writes
        all its keys and values before it reads any."""
        chunks: list[ScheduledChunk] = []
        for sequence in [running for running in self.running if running.passes_border(self._rope_borders)]:
            self._preempt(sequence)
        for sequence in list(self.running):
            if len(sequence.tokens) - sequence.computed == 1 and self._ensure_blocks(sequence):
                chunks.append(ScheduledChunk(sequence, sequence.computed, 1))
        # A sequence that was scheduled first may have been preempted for one after it.
        chunks = [chunk for chunk in chunks if chunk.sequence.block_table]
        for chunk in chunks:
            self._cache_full_blocks(chunk)
        budget = self._max_step_tokens - len(chunks)
        for sequence in self.running:
            if len(sequence.tokens) - sequence.computed > 1 and budget > 0:
                budget -= self._prefill(sequence, budget, chunks)
        self._admit(budget, chunks)
        for chunk in chunks:
            if chunk.samples:
                self._admission.sampled(chunk.sequence)
        return chunks

    def _admit(self, budget: int, chunks: list[ScheduledChunk]) -> None:
        """Moves sequences to running whose turn it is. If there are no blocks for one, nobody overtakes it."""
        candidates = self._admission.candidates()
        while len(self.running) < self._max_sequences and budget > 0:
            sequence = next(candidates, None)
            if sequence is None:
                break
            if not self._take_blocks(sequence):
                self._free(sequence)
                break
            self._admission.begin(sequence)
            self.running.append(sequence)
            budget -= self._prefill(sequence, budget, chunks)
        self._admission.ask_for_adapters()

    # ------------------------------------------------------------------------------------------ ends

    def _output(self, sampled: Sampled) -> SequenceOutput | None:
        """What a sequence sends after its chunk was run, if anything."""
        sequence, chunk = sampled.chunk.sequence, sampled.chunk
        if not sampled.finite:
            # What it computed is found by nobody.
            self._clear_blocks(self._blocks.forget(sequence.block_table))
            return self.fail(sequence, ends.not_finite(sequence))
        sequence.computed += chunk.count
        sequence.prompt_logprobs += sampled.prompt_logprobs
        if not chunk.samples:
            return None
        if chunk.pools:
            return self._end(sequence, SequenceOutput(sequence.id, [], "stop", pooled=sampled.pooled))
        scored = list(sequence.prompt_logprobs) if sequence.wants_prompt_logprobs else None
        if not chunk.samples_token:
            return self._end(sequence, SequenceOutput(sequence.id, [], "length", prompt_logprobs=scored))
        if sampled.token is None or not sequence.accepts(sampled.token):
            return self.fail(sequence, ends.nothing_allowed(sequence))
        cached = (sequence.cached_tokens or 0) if sequence.generated == 0 else 0
        sequence.tokens.append(sampled.token)
        finish = ends.finish_reason(sequence, sampled.token, self.eos_token_ids)
        token_ids, logprobs = [sampled.token], sampled.logprobs
        output = SequenceOutput(sequence.id, token_ids, finish, logprobs, scored, cached_tokens=cached)
        return self._end(sequence, output) if finish else output

    def _end(self, sequence: Sequence, output: SequenceOutput) -> SequenceOutput:
        del self.sequences[sequence.id]
        self.finish(sequence)
        return output

    # ------------------------------------------------------------------------------------------ blocks

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, those that the cache has among them. The last token is always computed, and so are
        all of a prompt that needs logits, or hidden states, everywhere."""
        sequence.passes_border(self._rope_borders)  # with its adapter's virtual tokens, say
        if self._prefix_cache and not sequence.wants_prompt_logprobs and sequence.request.pool is None:
            full = (len(sequence.tokens) - 1) // BLOCK_TOKENS
            keys = (sequence.block_key(index) for index in range(full))
            sequence.cached_blocks = self._blocks.share(sequence.block_table, keys)
            sequence.computed = sequence.cached_blocks * BLOCK_TOKENS
        return self._blocks.extend(sequence.block_table, len(sequence.tokens))

    def _cache_full_blocks(self, chunk: ScheduledChunk) -> None:
        """Lets others find the blocks that the chunk makes full."""
        sequence = chunk.sequence
        if not self._prefix_cache or sequence.is_refused:  # which is never computed
            return
        full = (chunk.start + chunk.count) // BLOCK_TOKENS
        for index in range(sequence.cached_blocks, full):
            self._blocks.cache(sequence.block_table[index], sequence.block_key(index))
        sequence.cached_blocks = full

    def _prefill(self, sequence: Sequence, budget: int, chunks: list[ScheduledChunk]) -> int:
        count = min(len(sequence.tokens) - sequence.computed, budget)
        if sequence.wants_prompt_logprobs:
            count = min(count, _PROMPT_LOGPROBS_CHUNK)
        chunks.append(ScheduledChunk(sequence, sequence.computed, count))
        self._cache_full_blocks(chunks[-1])
        return count

    def _ensure_blocks(self, sequence: Sequence) -> bool:
        """Blocks for the sequence's newest token. While there are none, the newest of those with the lowest priority
        are preempted. False if the sequence itself was."""
        if not sequence.block_table:
            return False
        while not self._blocks.extend(sequence.block_table, len(sequence.tokens)):
            victim = min(reversed(self.running), key=lambda running: running.priority)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Makes a running sequence wait, and be computed anew."""
        self.running.remove(sequence)
        self._free(sequence)
        self._admission.preempt(sequence)

    def _free(self, sequence: Sequence) -> None:
        """Gives blocks and lease back."""
        self._forget_computed(sequence)
        self._admission.release(sequence)

    def _forget_computed(self, sequence: Sequence) -> None:
        """Gives blocks back. What the cache has lost by then is computed again if the sequence runs later."""
        self._blocks.release(sequence.block_table)
        sequence.computed = sequence.cached_blocks = 0
        sequence.prompt_logprobs.clear()
