"""Whose turn it is: waiting sequences by client, under virtual token counters (VTC, arXiv:2401.00588).

A client is an adapter, or the base. Its counter grows by what it is served, so the client with the smallest one was
served least and is next. One that comes back is lifted to the smallest counter of those that wait: what it did not ask
for while it was away is not owed to it. Higher priorities come before all of that.

Every operation costs the logarithm of the clients that wait, whatever number of sequences they have.
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

_KEPT_CLIENTS = 1024
"""With more clients than these, those that gain nothing by their counters are forgotten."""

Key = TypeVar("Key", int, tuple[int, int])


class Client:
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
        """Sorts clients by their turns."""
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
    """Clients in the order of a key that only grows while they are here; put one again where it shrank.

    A heap whose entries are corrected when they come to its top.
    """

    def __init__(self, key: Callable[[Client], Key]) -> None:
        self._key: Callable[[Client], Key] = key
        self._heap: list[tuple[Key, int, Client]] = []
        self._stamps: dict[Client, int] = {}
        self._next_stamp = itertools.count()

    def __len__(self) -> int:
        return len(self._stamps)

    def __contains__(self, client: Client) -> bool:
        return client in self._stamps

    def put(self, client: Client) -> None:
        """Adds a client, or finds its place anew."""
        if len(self._heap) > 2 * len(self._stamps) + 64:
            self._heap = [entry for entry in self._heap if self._stamps.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
        stamp = self._stamps[client] = next(self._next_stamp)
        heapq.heappush(self._heap, (self._key(client), stamp, client))

    def remove(self, client: Client) -> None:
        """Takes a client out, if it is here."""
        self._stamps.pop(client, None)

    def first(self) -> Client | None:
        """The client with the smallest key; of equal ones the one that came first."""
        while self._heap:
            key, stamp, client = self._heap[0]
            if self._stamps.get(client) != stamp:
                heapq.heappop(self._heap)
            elif key != self._key(client):
                heapq.heapreplace(self._heap, (self._key(client), stamp, client))
            else:
                return client
        return None


class FairQueue:
    """The waiting sequences. A client whose adapter is known to be away waits apart from the others (`away`)."""

    def __init__(self) -> None:
        self.ready = Turns(lambda client: client.turn)
        self.away = Turns(lambda client: client.turn)
        self._all = Turns(lambda client: client.counter)
        self._clients: dict[str | None, Client] = {}
        self._most_clients = _KEPT_CLIENTS
        self._last: Client | None = None
        """The client that was the last to have nothing waiting any more."""

    def waiting(self, digest: str) -> list[Sequence]:
        """The waiting sequences of an adapter."""
        client = self._clients.get(digest)
        return list(client.waiting()) if client else []

    def digests(self) -> set[str | None]:
        """Of the clients that have something waiting."""
        return {client.digest for client in self._clients.values() if client.waits}

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        client = self._clients.get(sequence.digest)
        if client is None:
            client = self._clients[sequence.digest] = Client(sequence.digest)
        client.sequences += 1
        if client.waits:
            sooner = sequence.priority > client.first.priority
            client.add(sequence)
            turns = next((turns for turns in (self.ready, self.away) if client in turns), None)
            if sooner and turns is not None:
                turns.put(client)
            return
        client.counter = max(client.counter, self._floor())
        client.add(sequence)
        self._all.put(client)
        self.ready.put(client)

    def remove(self, sequence: Sequence) -> bool:
        """Takes a waiting sequence out, to run or because it ended; false if it does not wait."""
        client = self._clients[sequence.digest]
        if not client.remove(sequence):
            return False
        if not client.waits:
            self._last = client
            for turns in (self.ready, self.away, self._all):
                turns.remove(client)
        return True

    def ended(self, sequence: Sequence) -> None:
        """A sequence that does not wait any more has ended."""
        self._clients[sequence.digest].sequences -= 1
        if len(self._clients) <= self._most_clients:
            return
        # Coming back, they would be lifted to the floor all the same.
        floor = self._floor()
        gone = [client for client in self._clients.values() if not client.sequences and client.counter <= floor]
        for client in gone:
            del self._clients[client.digest]
        self._most_clients = max(_KEPT_CLIENTS, 2 * len(self._clients))

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Adds to the counter of a sequence's client."""
        self._clients[sequence.digest].counter += cost

    def set_away(self, client: Client) -> None:
        """The client's adapter is not loaded."""
        self.ready.remove(client)
        self.away.put(client)

    def set_ready(self, client: Client) -> None:
        """The client's adapter is loaded."""
        self.away.remove(client)
        self.ready.put(client)

    def _floor(self) -> int:
        """The smallest counter of clients that wait; where nobody does, that of the last one that did."""
        least = self._all.first() or self._last
        return 0 if least is None else least.counter
