"""What runs in the next step: decodes first, then prefills under a token budget, then whose turn it is to begin.

Turns go by priority, then by fairness between adapters (fairness.py), then by arrival. A step costs what runs and what
begins, not what waits.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterator

from graftwork_server.engine.adapter_pool import AdapterPool
from graftwork_server.engine.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, Client, FairQueue
from graftwork_server.engine.kv_cache import BLOCK_TOKENS, BlockPool
from graftwork_server.engine.sequence import ScheduledChunk, Sequence

_PROMPT_LOGPROBS_CHUNK = 256
"""Tokens per step of a sequence that needs logits at each of them: a chunk's logits are [tokens, vocabulary] floats."""
_ASKED_ADAPTERS = 4
"""Adapters that are being loaded, or were and have not been used yet: more could push each other out unused."""


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
        prefix_cache: bool = True,
    ) -> None:
        """`request_load` is called for a sequence whose turn it is and whose adapter is not loaded, in every step anew.
        prefix_cache: full blocks are found again by sequences that begin with the same tokens."""
        self.running: list[Sequence] = []
        self.prompt_tokens = 0
        """Prompt tokens of all sequences that ever began, virtual ones not counted."""
        self.cached_tokens = 0
        """Those of them that were in the cache."""
        self._queue = FairQueue()
        self._preempted: list[Sequence] = []  # by priority, then by age
        self._asked: dict[Client, None] = {}
        """Clients whose adapter was asked for and is not there yet."""
        self._fresh: dict[Client, int] = {}
        """Clients whose adapter came just now, and the counter up to which they go first: else another load, asked for
        by somebody whose turn comes before, could push it out unused."""
        self._blocks = blocks
        self._adapters = adapters
        self._request_load = request_load
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens
        self._prefix_cache = prefix_cache

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        self._queue.add(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step; empty if nothing can run now. Their blocks are taken, and the full ones among
        them are found by others from now on: a step writes all its keys and values before it reads any."""
        chunks: list[ScheduledChunk] = []
        for sequence in list(self.running):
            if len(sequence.tokens) - sequence.computed == 1 and self._ensure_blocks(sequence):
                chunks.append(ScheduledChunk(sequence, sequence.computed, 1))
        # A sequence that was scheduled first may have been preempted for one after it.
        chunks = [chunk for chunk in chunks if chunk.sequence.block_table]
        for chunk in chunks:
            self._keep(chunk)
        budget = self._max_step_tokens - len(chunks)
        for sequence in self.running:
            if len(sequence.tokens) - sequence.computed > 1 and budget > 0:
                budget -= self._prefill(sequence, budget, chunks)
        self._admit(budget, chunks)
        self._ask_for_adapters()
        for chunk in chunks:
            if chunk.samples:
                self._queue.charge(chunk.sequence, OUTPUT_WEIGHT)
        return chunks

    def waited_for(self) -> set[str]:
        """Digests of the adapters of waiting sequences, preempted ones included."""
        digests = {sequence.digest for sequence in self._preempted} | self._queue.digests()
        return {digest for digest in digests if digest is not None}

    def waiting_for(self, digest: str) -> list[Sequence]:
        """All sequences of an adapter that wait, preempted ones included."""
        preempted = [sequence for sequence in self._preempted if sequence.digest == digest]
        return preempted + self._queue.waiting(digest)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees what it holds."""
        if not self._queue.remove(sequence):
            (self.running if sequence in self.running else self._preempted).remove(sequence)
        self._queue.ended(sequence)
        self._free(sequence)

    # ------------------------------------------------------------------------------------------ who begins

    def _admit(self, budget: int, chunks: list[ScheduledChunk]) -> None:
        """Moves sequences to running whose turn it is. If there are no blocks for one, nobody overtakes it."""
        candidates = self._candidates()
        while len(self.running) < self._max_sequences and budget > 0:
            sequence = next(candidates, None)
            if sequence is None:
                return
            if not self._take_blocks(sequence):
                self._free(sequence)
                return
            if not self._queue.remove(sequence):
                self._preempted.remove(sequence)
            self.running.append(sequence)
            self._count(sequence)
            budget -= self._prefill(sequence, budget, chunks)

    def _candidates(self) -> Iterator[Sequence]:
        """Sequences to begin, in order, their adapters leased. Whoever takes one begins it or asks for no other.

        One whose adapter is away is passed by. But where a load waits for room, nobody is let in whose turn comes after
        that of a sequence whose adapter is away, so that leases end and it gets its turn.
        """
        self._look_for_loaded()
        preempted = deque(self._preempted)
        while True:
            client = self._first_client()
            if preempted and (client is None or preempted[0].priority >= client.first.priority):
                sequence = preempted.popleft()
                if self._lease(sequence):
                    yield sequence
                elif self._adapters.waits_for_room:
                    return
                continue
            if client is None or (client not in self._fresh and self._is_held(client)):
                return
            sequence = client.first
            if self._lease(sequence):
                yield sequence
            else:
                self._queue.set_away(client)

    def _first_client(self) -> Client | None:
        for client, most in list(self._fresh.items()):
            if client in self._queue.ready and client.counter < most:
                return client
            del self._fresh[client]
        return self._queue.ready.first()

    def _is_held(self, client: Client) -> bool:
        if not self._adapters.waits_for_room:
            return False
        away = [asked.turn for asked in self._asked if asked.waits]
        first = self._queue.away.first()
        if first is not None:
            away.append(first.turn)
        return any(turn < client.turn for turn in away)

    def _lease(self, sequence: Sequence) -> bool:
        if sequence.digest is not None:
            sequence.adapter = self._adapters.lease(sequence.digest)
        return sequence.digest is None or sequence.adapter is not None

    def _look_for_loaded(self) -> None:
        """Finds the clients whose adapter came since it was asked for."""
        for client in list(self._asked):
            if not client.waits or client in self._queue.ready:
                del self._asked[client]
            elif client.digest is not None and self._adapters.report(client.digest) is not None:
                del self._asked[client]
                self._queue.set_ready(client)
                self._fresh[client] = client.counter + self._max_step_tokens

    def _ask_for_adapters(self) -> None:
        """Asks for the adapters that are away and come next, in the order of their turns."""
        for sequence in self._preempted:
            if sequence.digest is not None and self._adapters.report(sequence.digest) is None:
                self._request_load(sequence)
        while len(self._asked) + len(self._fresh) < _ASKED_ADAPTERS:
            client = self._queue.away.first()
            if client is None:
                break
            self._queue.away.remove(client)
            self._asked[client] = None
        for client in self._asked:
            if client.waits:
                self._request_load(client.first)

    def _count(self, sequence: Sequence) -> None:
        """What a sequence that begins costs its client; one that was preempted has paid already."""
        if sequence.cached_tokens is not None:
            return
        virtual = sequence.virtual_tokens
        sequence.cached_tokens = max(0, sequence.computed - virtual)
        self.prompt_tokens += len(sequence.tokens) - virtual
        self.cached_tokens += sequence.cached_tokens
        self._queue.charge(sequence, INPUT_WEIGHT * (len(sequence.tokens) - sequence.computed))

    # ------------------------------------------------------------------------------------------ blocks

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, those that the cache has among them. The last token is always computed, and so are
        all of a prompt that needs logits, or hidden states, everywhere."""
        if self._prefix_cache and not sequence.wants_prompt_logprobs and sequence.request.pool is None:
            full = (len(sequence.tokens) - 1) // BLOCK_TOKENS
            keys = (sequence.block_key(index) for index in range(full))
            sequence.kept_blocks = self._blocks.share(sequence.block_table, keys)
            sequence.computed = sequence.kept_blocks * BLOCK_TOKENS
        return self._blocks.extend(sequence.block_table, len(sequence.tokens))

    def _keep(self, chunk: ScheduledChunk) -> None:
        """Lets others find the blocks that the chunk makes full."""
        sequence = chunk.sequence
        if not self._prefix_cache or sequence.too_long:
            return
        full = (chunk.start + chunk.count) // BLOCK_TOKENS
        for index in range(sequence.kept_blocks, full):
            self._blocks.keep(sequence.block_table[index], sequence.block_key(index))
        sequence.kept_blocks = full

    def _prefill(self, sequence: Sequence, budget: int, chunks: list[ScheduledChunk]) -> int:
        count = min(len(sequence.tokens) - sequence.computed, budget)
        if sequence.wants_prompt_logprobs:
            count = min(count, _PROMPT_LOGPROBS_CHUNK)
        chunks.append(ScheduledChunk(sequence, sequence.computed, count))
        self._keep(chunks[-1])
        return count

    def _ensure_blocks(self, sequence: Sequence) -> bool:
        """Blocks for the sequence's newest token. While there are none, the newest of those with the lowest priority
        are preempted. False if the sequence itself was."""
        if not sequence.block_table:
            return False
        while not self._blocks.extend(sequence.block_table, len(sequence.tokens)):
            victim = min(reversed(self.running), key=lambda running: running.priority)
            self.running.remove(victim)
            self._free(victim)
            bisect.insort_left(self._preempted, victim, key=lambda preempted: -preempted.priority)
            if victim is sequence:
                return False
        return True

    def _free(self, sequence: Sequence) -> None:
        """Gives blocks and lease back. What the cache has lost by then is computed again if the sequence
        runs later."""
        self._blocks.release(sequence.block_table)
        sequence.computed = sequence.kept_blocks = 0
        sequence.prompt_logprobs.clear()
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
            sequence.adapter = None
