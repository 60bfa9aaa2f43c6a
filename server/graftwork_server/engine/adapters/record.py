"""What the engine knows of one adapter, by its digest; the only file in which the state of one changes.

    absent ──queue──> queued ──> reading ──> binding ──> waiting for room ──settle──> loaded
      ^                                 │          │             │                    │    │
      ├──────────── no room found ──────┴──────────┴─────────────┤                    │    │
      ├──────────── failed, once its waiters are told ───────────┘                    │    │
      ├──gone── yielding (loads that wait need its place) <──────────────────────────-┘    │
      └──gone── unloading (asked for by name; until its last lease ends) <─────────────────┘

One that yields stays if no load needs its place any more, and is evicted at once where nobody leases it. A load may be
under way while what an earlier one brought is still yielding or unloading: the load's stage is the state
then. `stage`, `error` and what waits belong to the step thread and to the load's own thread; what is on the device
changes under the pool's lock.
"""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass, field

from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.errors import ErrorBody
from graftwork_server.types import AdapterRef


class State(enum.Enum):
    """Where an adapter is on its way."""

    ABSENT = "absent"
    QUEUED = "queued"
    READING = "reading"
    BINDING = "binding"
    WAITING = "waiting for room"
    LOADED = "loaded"
    YIELDING = "yielding"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(eq=False)
class AdapterRecord:
    """One adapter of the engine."""

    digest: str

    stage: State | None = None
    """Of the load under way: QUEUED to WAITING."""
    source: AdapterRef | None = None
    """What is loaded."""
    not_due: threading.Event = field(default_factory=threading.Event)
    """Nobody needs the load at once: it waits for no room."""
    started: float = 0.0
    """time.perf_counter() when the load was asked for."""
    needed_bytes: int = 0
    """What a load that waits for room needs."""
    error: ErrorBody | None = None
    """Why the last load failed, while those who waited for it are told."""
    load_calls: list[int] = field(default_factory=list)
    """Calls that wait for the load."""
    unload_calls: list[int] = field(default_factory=list)
    """Calls that wait for the load, to unload what it brings."""

    loaded: LoadedAdapter | None = None
    """Its place on the device, with the leases on it."""
    leaving: State | None = None
    """YIELDING or UNLOADING: it gives no new leases."""
    is_evicted: bool = False
    """On its way to the host cache."""
    is_pinned: bool = False
    """Never evicted, loaded or not."""
    last_use: int = 0
    """Counts leases of the pool."""

    @property
    def state(self) -> State:
        """Where the adapter is."""
        if self.stage is not None:
            return self.stage
        if self.loaded is not None:
            return self.leaving or State.LOADED
        return State.ABSENT if self.error is None else State.FAILED

    @property
    def is_loading(self) -> bool:
        """A load is under way."""
        return self.stage is not None

    @property
    def leasable(self) -> LoadedAdapter | None:
        """What a new lease can be had of."""
        return self.loaded if self.leaving is None else None

    @property
    def is_unloading(self) -> bool:
        """It goes when its last lease ends, whoever needs its place."""
        return self.leaving is State.UNLOADING

    @property
    def may_yield(self) -> bool:
        """It is not pinned, and those who waited for it have had their chance."""
        return self.loaded is not None and not self.is_pinned and not self.loaded.is_new

    @property
    def leases(self) -> int:
        """Claims on its place."""
        return self.loaded.leases if self.loaded is not None else 0

    @property
    def is_forgettable(self) -> bool:
        """Nothing is known of it that would have to be kept."""
        has_calls = self.load_calls or self.unload_calls
        return not (self.is_loading or self.loaded or self.error or self.is_evicted or self.is_pinned or has_calls)

    # ------------------------------------------------------------------------------------------ a load

    def queue(self, source: AdapterRef, *, is_due: bool) -> None:
        """A load begins."""
        assert self.stage is None, f"{self.digest} is {self.state.value}"
        self.stage, self.source, self.error = State.QUEUED, source, None
        self.started = time.perf_counter()
        self.set_due(is_due)

    def set_due(self, is_due: bool) -> None:
        """Whether the load is needed now; if not, it does not wait for room any longer."""
        (self.not_due.clear if is_due else self.not_due.set)()

    def read(self) -> None:
        """Its files are read."""
        self.stage = State.READING

    def bind(self) -> None:
        """What was read is bound to the base."""
        self.stage = State.BINDING

    def wait(self, needed_bytes: int) -> None:
        """It waits for room."""
        self.needed_bytes = needed_bytes
        if self.stage is not None:
            self.stage = State.WAITING

    def end_wait(self) -> None:
        """It has room, or gave up."""
        self.needed_bytes = 0

    def end_load(self, error: ErrorBody | None = None) -> None:
        """The load is over: what it brought is loaded, or it found no room, or failed."""
        self.stage, self.source, self.error = None, None, error

    def take_calls(self) -> list[int]:
        """The calls that wait for the load; they wait no longer."""
        calls, self.load_calls = self.load_calls, []
        return calls

    # ------------------------------------------------------------------------------------------ on the device

    def settle(self, loaded: LoadedAdapter) -> None:
        """It has a place on the device."""
        self.loaded, self.leaving = loaded, None

    def yield_place(self) -> None:
        """It is to go for loads that wait."""
        self.leaving = self.leaving or State.YIELDING

    def stay(self) -> None:
        """No load needs its place any more."""
        if self.leaving is State.YIELDING:
            self.leaving = None

    def unload(self) -> None:
        """It is to go, whoever needs its place."""
        self.leaving = State.UNLOADING

    def evict(self) -> LoadedAdapter:
        """Takes it out of reach, to be copied to the host cache."""
        assert self.loaded is not None
        loaded = self.loaded
        self.gone()
        self.is_evicted = True
        return loaded

    def gone(self) -> None:
        """It has no place any more."""
        self.loaded = self.leaving = None
