"""Loads off the step loop, each adapter once for all that wait for it, in the order in which they were asked for.

A load for sequences that come next, or for a client's own call, is due: it waits for room, and others make room for
it. One for sequences that have to wait anyway runs ahead of time: it takes room that nobody needs, or else the host
cache. A load that waits for room holds one of a few threads, so that others go on beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from graftwork_plugins import Delta
from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.engine.adapters.pool import AdapterPool
from graftwork_server.engine.adapters.record import AdapterRecord
from graftwork_server.engine.helper_threads import HelperThreads, compute_alone
from graftwork_server.layers.binding.prepared import PreparedAdapter
from graftwork_server.types import AdapterRef

_THREADS = 4
_FIRST_TOKEN_SECONDS = 0.05
"""What a step or two take: who waited for a load begins before memory for the next one is made ready."""
_LARGE_BYTES = 256 * 1024 * 1024
"""Files from this size on, whole checkpoints mostly, are read one at a time and keep no other load waiting."""

Result = LoadedAdapter | BaseException | None
"""The adapter with one lease, why it could not be loaded, or None if it found no room and is not due."""
Done = Callable[[AdapterRecord, Result], None]


class Loader:
    """The loader threads."""

    def __init__(
        self,
        read: Callable[[AdapterRef], Sequence[Delta]],
        bind: Callable[[str, Sequence[Delta]], PreparedAdapter],
        pool: AdapterPool,
        done: Done,
    ) -> None:
        """`read` takes the deltas out of an adapter's files, `bind` makes them fit the base; `done` is called in a
        loader thread."""
        self._read = read
        self._bind = bind
        self._pool = pool
        self._done = done
        self._threads = HelperThreads(_THREADS, "load", compute_alone)
        self._large = HelperThreads(1, "load-large", compute_alone)
        self._reading = threading.Lock()

    def start(self, record: AdapterRecord) -> None:
        """Runs the load that was queued."""
        self._threads.submit(self._run, record)

    def give_up(self) -> None:
        """Nothing is needed any more."""
        for record in self._pool.loading():
            record.set_due(False)

    def _run(self, record: AdapterRecord, in_own_thread: bool = False) -> None:
        result: Result = None
        try:
            assert record.source is not None  # it was queued
            if in_own_thread or _file_bytes(record.source.path) < _LARGE_BYTES:
                result = self._load(record, record.source, nullcontext() if in_own_thread else self._reading)
            elif not record.not_due.is_set():
                self._large.submit(self._run, record, True)
                return
            # A large one that is not due would be read for nothing, which costs seconds.
        except BaseException as error:  # a panic in a library in Rust is no Exception
            result = error
        self._done(record, result)
        # Where other loads wait for this thread, each touches its memory itself.
        if isinstance(result, LoadedAdapter) and self._pool.loading() in ([], [record]):
            time.sleep(_FIRST_TOKEN_SECONDS)
            self._pool.ready_next_slot(result)

    def _load(
        self, record: AdapterRecord, source: AdapterRef, reading: AbstractContextManager[Any]
    ) -> LoadedAdapter | None:
        prepared = self._pool.host_cache.take(record.digest)
        if prepared is None:
            with reading:
                record.read()
                deltas = self._read(source)
                record.bind()
                prepared = self._bind(record.digest, deltas)
        placed = self._pool.place_now(prepared, record.started)
        if placed is None and not record.not_due.is_set():
            placed = self._pool.place(prepared, record.started, record.not_due)
        if placed is None:
            self._pool.cache_on_host(prepared)
        return placed


def _file_bytes(folder: str) -> int:
    return sum(entry.stat().st_size for entry in Path(folder).iterdir())
