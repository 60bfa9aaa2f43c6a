"""Loads off the step loop, each adapter once for all that wait for it, in the order in which they were asked for.

A load for sequences that could run now, or for a client's own call, is due: it waits for room, and others make room for
it. One for sequences that have to wait anyway runs ahead of time: it takes room that nobody needs, or else the host
cache. A load that waits for room holds one of a few threads, so that others go on beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from graftwork_server.engine.adapter_pool import AdapterPool
from graftwork_server.engine.helper_threads import compute_alone
from graftwork_server.engine.slots import LoadedAdapter, PreparedAdapter
from graftwork_server.types import AdapterRef

_THREADS = 4
_LARGE_BYTES = 256 * 1024 * 1024
"""Files from this size on, whole checkpoints mostly, are read one at a time and keep no other load waiting."""

Done = Callable[[LoadedAdapter | Exception | None], None]
"""Gets the adapter with one lease, why it could not be loaded, or None if a load ahead of time found no room."""


class Loads:
    """The loader threads. Only the step thread calls `start`."""

    def __init__(
        self, prepare: Callable[[AdapterRef], PreparedAdapter], pool: AdapterPool, stop: threading.Event
    ) -> None:
        """`prepare` reads and checks an adapter. Waiting loads are given up when `stop` is set."""
        self._prepare = prepare
        self._pool = pool
        self._stop = stop
        self._threads = ThreadPoolExecutor(_THREADS, "load", compute_alone)
        self._large = ThreadPoolExecutor(1, "load-large", compute_alone)
        self._reading = threading.Lock()
        self._due: set[str] = set()

    def start(self, adapter: AdapterRef, done: Done) -> None:
        """Queues a load; `done` is called in a loader thread. Not twice for one adapter before the first is done."""
        started = time.perf_counter()

        def load() -> None:
            try:
                if _file_bytes(adapter.path) < _LARGE_BYTES:
                    self._load(adapter, started, self._reading, done)
                elif adapter.digest in self._due:
                    self._large.submit(self._load, adapter, started, nullcontext(), done)
                else:  # read for nothing, it would have cost seconds
                    done(None)
            except Exception as error:
                done(error)

        self._threads.submit(load)

    def is_due(self, digest: str) -> None:
        """A load that was started, or will be, is needed now."""
        self._due.add(digest)

    def _load(self, adapter: AdapterRef, started: float, reading: AbstractContextManager[Any], done: Done) -> None:
        try:
            placed = self._placed(adapter, started, reading)
        except Exception as error:
            done(error)
            return
        finally:
            self._due.discard(adapter.digest)
        done(placed)
        if placed is not None:
            self._pool.ready_next_slot(placed)

    def _placed(
        self, adapter: AdapterRef, started: float, reading: AbstractContextManager[Any]
    ) -> LoadedAdapter | None:
        prepared = self._pool.host_cache.take(adapter.digest)
        if prepared is None:
            with reading:
                prepared = self._prepare(adapter)
        placed = self._pool.place_now(prepared, started)
        if placed is None and adapter.digest in self._due:
            placed = self._pool.place(prepared, started, self._stop)
        if placed is None:
            self._pool.keep(prepared)
        return placed


def _file_bytes(folder: str) -> int:
    return sum(entry.stat().st_size for entry in Path(folder).iterdir())
