"""Who begins next: what waits, in the order of its turns, its adapter leased; and what is loaded for those to come.

Turns go by priority, then by fairness between adapters (fairness.py), then by arrival; preempted sequences come before
others of their priority. One whose adapter is not loaded is passed by, and its adapter is asked for. Room for adapters
is the pool's affair alone: it lets those in use yield to loads that wait (adapters/pool.py).
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterator

from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.engine.adapters.pool import AdapterPool
from graftwork_server.engine.scheduling.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, AdapterQueue, FairQueue
from graftwork_server.engine.scheduling.sequence import Sequence

_ASKED_ADAPTERS = 4
"""Adapters that are being loaded, or were and have not been used yet."""


class Admission:
    """The sequences that wait, preempted ones included, and leases of what was loaded for them."""

    def __init__(self, adapters: AdapterPool, request_load: Callable[[Sequence], object], max_step_tokens: int) -> None:
        """`request_load` is called for a sequence whose turn comes and whose adapter is not loaded, in every step
        anew."""
        self.prompt_tokens = 0
        """Prompt tokens of all sequences that ever began, virtual ones not counted."""
        self.cached_tokens = 0
        """Those of them that were in the cache."""
        self._adapters = adapters
        self._request_load = request_load
        self._max_step_tokens = max_step_tokens
        self._queue = FairQueue()
        self._preempted: list[Sequence] = []  # by priority, then by age
        self._asked: dict[AdapterQueue, None] = {}
        """Queues whose adapter was asked for and is not there yet."""
        self._first: dict[AdapterQueue, int] = {}
        """Queues whose adapter came since they asked, and the counter up to which they go first."""
        self._arrived: list[LoadedAdapter] = []
        """Each with its load's lease, until those who waited for it have had their turn: else another load, asked for
        by somebody whose turn comes before, could push it out unused."""

    # ------------------------------------------------------------------------------------------ what waits

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        self._queue.add(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Queues a sequence that ran, and newer ones of its priority did not."""
        bisect.insort_left(self._preempted, sequence, key=lambda preempted: -preempted.priority)

    def remove(self, sequence: Sequence) -> bool:
        """Takes a sequence out, to run or because it ended; false if it does not wait."""
        if self._queue.remove(sequence):
            return True
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return True
        return False

    def waited_for(self) -> set[str]:
        """Digests of the adapters of waiting sequences."""
        digests = {sequence.digest for sequence in self._preempted} | self._queue.digests()
        return {digest for digest in digests if digest is not None}

    def waiting_for(self, digest: str) -> list[Sequence]:
        """All sequences of an adapter that wait."""
        preempted = [sequence for sequence in self._preempted if sequence.digest == digest]
        return preempted + self._queue.waiting(digest)

    # ------------------------------------------------------------------------------------------ a step

    def arrived(self, adapter: LoadedAdapter) -> None:
        """An adapter was loaded; its load's lease passes to this."""
        self._arrived.append(adapter)

    def candidates(self) -> Iterator[Sequence]:
        """Sequences to begin, in order, their adapters leased. Whoever takes one begins it, or releases it and asks for
        no other."""
        self._look_for_arrived()
        return self._in_turn()

    def begin(self, sequence: Sequence) -> None:
        """A candidate runs from now on; what its queue is charged for it. Blocks in the cache cost nothing, and one
        that was preempted has paid already."""
        self.remove(sequence)
        if sequence.cached_tokens is not None:
            return
        virtual = sequence.virtual_tokens
        sequence.cached_tokens = max(0, sequence.computed - virtual)
        self.prompt_tokens += len(sequence.tokens) - virtual
        self.cached_tokens += sequence.cached_tokens
        self._queue.charge(sequence, INPUT_WEIGHT * (len(sequence.tokens) - sequence.computed))

    def sampled(self, sequence: Sequence) -> None:
        """Charges a sequence's queue for a token."""
        self._queue.charge(sequence, OUTPUT_WEIGHT)

    def release(self, sequence: Sequence) -> None:
        """Gives a sequence's lease back, if it has one."""
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
            sequence.adapter = None

    def ended(self, sequence: Sequence) -> None:
        """A sequence that does not wait any more has ended."""
        self._queue.ended(sequence)
        self.release(sequence)

    def ask_for_adapters(self) -> None:
        """Once nobody else begins in this step: asks for the adapters that are not loaded and come next, in order of
        their turns."""
        for sequence in self._preempted:
            if sequence.digest is not None and self._adapters.report(sequence.digest) is None:
                self._request_load(sequence)
        self._release_arrived()
        while len(self._asked) + len(self._first) < _ASKED_ADAPTERS:
            queue = self._queue.unloaded.first()
            if queue is None:
                break
            self._queue.unloaded.remove(queue)
            self._asked[queue] = None
        for queue in self._asked:
            if queue.waits:
                self._request_load(queue.first)

    # ------------------------------------------------------------------------------------------ turns

    def _in_turn(self) -> Iterator[Sequence]:
        preempted = deque(self._preempted)
        while True:
            queue = self._first_queue()
            if preempted and (queue is None or preempted[0].priority >= queue.first.priority):
                sequence = preempted.popleft()
                if self._lease(sequence):
                    yield sequence
                continue
            if queue is None:
                return
            sequence = queue.first
            if self._lease(sequence):
                yield sequence
            else:
                self._queue.set_unloaded(queue)

    def _first_queue(self) -> AdapterQueue | None:
        for queue in list(self._first):
            if self._goes_first(queue):
                return queue
            del self._first[queue]
        return self._queue.ready.first()

    def _goes_first(self, queue: AdapterQueue) -> bool:
        return queue in self._queue.ready and queue.counter < self._first[queue]

    def _lease(self, sequence: Sequence) -> bool:
        if sequence.digest is not None:
            sequence.adapter = self._adapters.lease(sequence.digest)
        return sequence.digest is None or sequence.adapter is not None

    # ------------------------------------------------------------------------------------------ loads

    def _look_for_arrived(self) -> None:
        """Finds the queues whose adapter came since it was asked for."""
        for queue in list(self._asked):
            if not queue.waits or queue in self._queue.ready:
                del self._asked[queue]
            elif queue.digest is not None and self._adapters.report(queue.digest) is not None:
                del self._asked[queue]
                self._queue.set_ready(queue)
                self._first[queue] = queue.counter + self._max_step_tokens

    def _release_arrived(self) -> None:
        """Ends the leases of loads whose sequences have begun, or are gone, or whose adapter is to go itself."""
        for queue in list(self._first):
            if not self._goes_first(queue):
                del self._first[queue]
        awaited = {queue.digest for queue in self._first}
        highest = max((queue.first.priority for queue in self._asked if queue.waits), default=None)
        awaited.update(s.digest for s in self._preempted if highest is None or s.priority >= highest)
        arrived, self._arrived = self._arrived, []
        for adapter in arrived:
            if adapter.digest in awaited and self._adapters.report(adapter.digest) is not None:
                self._arrived.append(adapter)
            else:
                self._adapters.release(adapter)
