"""Whose turn it is: waiting sequences by adapter, under virtual token counters (VTC, arXiv:2401.00588).

Each adapter, and the base, has a queue; it is what the paper calls a client. Its counter grows by what it is served, so
the queue with the smallest one was served least and is next. One that comes back is lifted to the smallest counter of
those that wait: what it did not ask for meanwhile is not owed to it. Higher priorities come before all of that.

Every operation costs the logarithm of the queues that wait, whatever number of sequences they have.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from graftwork_server.engine.scheduling.sequence import Sequence

INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""What a prompt token that is computed and a token that is sampled cost; the paper's weights."""

_REMEMBERED_QUEUES = 1024
"""With more queues than these, those that gain nothing by their counters are forgotten."""

Key = TypeVar("Key", int, tuple[int, int])


class AdapterQueue:
    """An adapter, or the base (None), with its counter and what of it waits."""

    def __init__(self, digest: str | None) -> None:
        self.digest = digest
        self.counter = 0
        self.sequences = 0
        """Its sequences, waiting or not."""
        self._waiting: dict[int, OrderedDict[Sequence, None]] = {}

    @property
    def waits(self) -> bool:
        """It has a waiting sequence."""
        return bool(self._waiting)

    @property
    def first(self) -> Sequence:
        """The waiting sequence that came first, of those with the highest priority."""
        return next(iter(self._waiting[max(self._waiting)]))

    @property
    def turn(self) -> tuple[int, int]:
        """Sorts queues by their turns."""
        return (-max(self._waiting), self.counter)

    def waiting(self) -> Iterator[Sequence]:
        """All that waits."""
        return itertools.chain.from_iterable(self._waiting.values())

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence behind those of its priority."""
        self._waiting.setdefault(sequence.priority, OrderedDict())[sequence] = None

    def remove(self, sequence: Sequence) -> bool:
        """Takes a waiting sequence out; false if it does not wait."""
        same = self._waiting.get(sequence.priority)
        if same is None or sequence not in same:
            return False
        del same[sequence]
        if not same:
            del self._waiting[sequence.priority]
        return True


class Turns(Generic[Key]):
    """Queues in the order of a key that only grows while they are here; put one again where it shrank.

    A heap whose entries are corrected when they come to its top.
    """

    def __init__(self, key: Callable[[AdapterQueue], Key]) -> None:
        self._key: Callable[[AdapterQueue], Key] = key
        self._heap: list[tuple[Key, int, AdapterQueue]] = []
        self._stamps: dict[AdapterQueue, int] = {}
        self._next_stamp = itertools.count()

    def __len__(self) -> int:
        return len(self._stamps)

    def __contains__(self, queue: AdapterQueue) -> bool:
        return queue in self._stamps

    def put(self, queue: AdapterQueue) -> None:
        """Adds a queue, or finds its place anew."""
        if len(self._heap) > 2 * len(self._stamps) + 64:
            self._heap = [entry for entry in self._heap if self._stamps.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
        stamp = self._stamps[queue] = next(self._next_stamp)
        heapq.heappush(self._heap, (self._key(queue), stamp, queue))

    def remove(self, queue: AdapterQueue) -> None:
        """Takes a queue out, if it is here."""
        self._stamps.pop(queue, None)

    def first(self) -> AdapterQueue | None:
        """The queue with the smallest key; of equal ones the one that came first."""
        while self._heap:
            key, stamp, queue = self._heap[0]
            if self._stamps.get(queue) != stamp:
                heapq.heappop(self._heap)
            elif key != self._key(queue):
                heapq.heapreplace(self._heap, (self._key(queue), stamp, queue))
            else:
                return queue
        return None


class FairQueue:
    """The waiting sequences. A queue whose adapter is known not to be loaded waits apart from the others."""

    def __init__(self) -> None:
        self.ready = Turns(lambda queue: queue.turn)
        self.unloaded = Turns(lambda queue: queue.turn)
        self._all = Turns(lambda queue: queue.counter)
        self._queues: dict[str | None, AdapterQueue] = {}
        self._most_queues = _REMEMBERED_QUEUES
        self._last: AdapterQueue | None = None
        """The queue that was the last to have nothing waiting any more."""

    def waiting(self, digest: str) -> list[Sequence]:
        """The waiting sequences of an adapter."""
        queue = self._queues.get(digest)
        return list(queue.waiting()) if queue else []

    def digests(self) -> set[str | None]:
        """Of the queues that have something waiting."""
        return {queue.digest for queue in self._queues.values() if queue.waits}

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        queue = self._queues.get(sequence.digest)
        if queue is None:
            queue = self._queues[sequence.digest] = AdapterQueue(sequence.digest)
        queue.sequences += 1
        if queue.waits:
            sooner = sequence.priority > queue.first.priority
            queue.add(sequence)
            turns = next((turns for turns in (self.ready, self.unloaded) if queue in turns), None)
            if sooner and turns is not None:
                turns.put(queue)
            return
        queue.counter = max(queue.counter, self._floor())
        queue.add(sequence)
        self._all.put(queue)
        self.ready.put(queue)

    def remove(self, sequence: Sequence) -> bool:
        """Takes a waiting sequence out, to run or because it ended; false if it does not wait."""
        queue = self._queues[sequence.digest]
        if not queue.remove(sequence):
            return False
        if not queue.waits:
            self._last = queue
            for turns in (self.ready, self.unloaded, self._all):
                turns.remove(queue)
        return True

    def ended(self, sequence: Sequence) -> None:
        """A sequence that does not wait any more has ended."""
        self._queues[sequence.digest].sequences -= 1
        if len(self._queues) <= self._most_queues:
            return
        # Coming back, they would be lifted to the floor all the same.
        floor = self._floor()
        gone = [queue for queue in self._queues.values() if not queue.sequences and queue.counter <= floor]
        for queue in gone:
            del self._queues[queue.digest]
        self._most_queues = max(_REMEMBERED_QUEUES, 2 * len(self._queues))

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Adds to the counter of a sequence's queue."""
        self._queues[sequence.digest].counter += cost

    def set_unloaded(self, queue: AdapterQueue) -> None:
        """The queue's adapter is not loaded."""
        self.ready.remove(queue)
        self.unloaded.put(queue)

    def set_ready(self, queue: AdapterQueue) -> None:
        """The queue's adapter is loaded."""
        self.unloaded.remove(queue)
        self.ready.put(queue)

    def _floor(self) -> int:
        """The smallest counter of queues that wait; where nobody does, that of the last one that did."""
        least = self._all.first() or self._last
        return 0 if least is None else least.counter
