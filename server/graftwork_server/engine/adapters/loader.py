"""Loads off the step loop, each adapter once for all that wait for it, in the order in which they were asked for.

A load for sequences that come next, or for a client's own call, is due: it waits for room, and others make room for
it. One for sequences that have to wait anyway runs ahead of time: it takes room that nobody needs, or else the host
cache. A load that waits for room holds one of a few threads, so that others go on beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork_server.engine.adapters.loaded import LoadedAdapter, PreparedAdapter
from graftwork_server.engine.adapters.pool import AdapterPool
from graftwork_server.engine.helper_threads import HelperThreads, compute_alone
from graftwork_server.types import AdapterRef

_THREADS = 4
_FIRST_TOKEN_SECONDS = 0.05
"""What a step or two take: who waited for a load begins before memory for the next one is made ready."""
_LARGE_BYTES = 256 * 1024 * 1024
"""Files from this size on, whole checkpoints mostly, are read one at a time and keep no other load waiting."""

Done = Callable[[LoadedAdapter | BaseException | None], None]
"""Gets the adapter with one lease, why it could not be loaded, or None if it found no room and is not due."""


@dataclass(frozen=True)
class _Load:
    adapter: AdapterRef
    done: Done
    not_due: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.perf_counter)


class Loads:
    """The loader threads. Only the step thread calls them."""

    def __init__(self, prepare: Callable[[AdapterRef], PreparedAdapter], pool: AdapterPool) -> None:
        """`prepare` reads and checks an adapter."""
        self._prepare = prepare
        self._pool = pool
        self._threads = HelperThreads(_THREADS, "load", compute_alone)
        self._large = HelperThreads(1, "load-large", compute_alone)
        self._reading = threading.Lock()
        self._under_way: dict[str, _Load] = {}

    def start(self, adapter: AdapterRef, done: Done, *, is_due: bool) -> None:
        """Queues a load; `done` is called in a loader thread. Not twice for one adapter before the first is done."""
        load = self._under_way[adapter.digest] = _Load(adapter, done)
        self.set_due(adapter.digest, is_due)
        self._threads.submit(self._run, load)

    def set_due(self, digest: str, is_due: bool) -> None:
        """Whether a load under way is needed now; if not, it does not wait for room any longer."""
        load = self._under_way.get(digest)
        if load is not None:
            (load.not_due.clear if is_due else load.not_due.set)()

    def give_up(self) -> None:
        """Nothing is needed any more."""
        for load in list(self._under_way.values()):
            load.not_due.set()

    def _run(self, load: _Load, in_own_thread: bool = False) -> None:
        result: LoadedAdapter | BaseException | None = None
        try:
            if in_own_thread or _file_bytes(load.adapter.path) < _LARGE_BYTES:
                result = self._load(load, nullcontext() if in_own_thread else self._reading)
            elif not load.not_due.is_set():
                self._large.submit(self._run, load, True)
                return
            # A large one that is not due would be read for nothing, which costs seconds.
        except BaseException as error:  # a panic in a library in Rust is no Exception
            result = error
        del self._under_way[load.adapter.digest]
        load.done(result)
        # Where other loads wait for this thread, each touches its memory itself.
        if isinstance(result, LoadedAdapter) and not self._under_way:
            time.sleep(_FIRST_TOKEN_SECONDS)
            self._pool.ready_next_slot(result)

    def _load(self, load: _Load, reading: AbstractContextManager[Any]) -> LoadedAdapter | None:
        prepared = self._pool.host_cache.take(load.adapter.digest)
        if prepared is None:
            with reading:
                prepared = self._prepare(load.adapter)
        placed = self._pool.place_now(prepared, load.started)
        if placed is None and not load.not_due.is_set():
            placed = self._pool.place(prepared, load.started, load.not_due)
        if placed is None:
            self._pool.keep(prepared)
        return placed


def _file_bytes(folder: str) -> int:
    return sum(entry.stat().st_size for entry in Path(folder).iterdir())
