"""Counted claims on versions: what a request or a job uses is not removed under it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from graftwork_server.errors import NotFound
from graftwork_server.hub.files.store import Store
from graftwork_server.hub.registry import Registry
from graftwork_server.process.threads import FILES

if TYPE_CHECKING:
    from graftwork_server.hub.resolver import Resolved


class Leases:
    """Claims by digest. Safe to use from several threads and from the event loop.

    The lock is held over counting alone. What publishes files or removes them takes its turn digest by digest: it
    reads the database and the disk, which nobody else is to wait for.
    """

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry
        self._lock = threading.Condition()
        self._claims: Counter[str] = Counter()
        self._removing: set[str] = set()

    @property
    def count(self) -> int:
        """Claims held now."""
        return sum(self._claims.values())

    @asynccontextmanager
    async def hold(self, resolved: Resolved) -> AsyncIterator[Resolved]:
        """Keeps the files of `resolved` while the block runs; for the base, nothing is needed.

        Raises NotFound if it was deleted since it was resolved.
        """
        if resolved.adapter is None:
            yield resolved
            return
        digest = resolved.adapter.digest
        self._claim(digest)
        try:
            # Claimed first, looked up second: a deletion before the look-up is seen, one after it waits for us. What is
            # being removed now has no version, and gets none before it is gone (claimed).
            published = self._registry.was_published(digest)
            if not published and not await asyncio.to_thread(self._registry.is_published, digest):
                raise NotFound(
                    f"adapter {resolved.model!r} was deleted just now", reason="ADAPTER_NOT_FOUND", field="model"
                )
            yield resolved
        finally:
            # Whoever deletes it from now on finds no claim, and removes the files.
            if self._release(digest) and not self._registry.was_published(digest):
                # Not awaited: whoever used it need not wait, and a cancelled request cannot.
                asyncio.get_running_loop().run_in_executor(FILES, self.remove_if_unused, digest)

    @contextmanager
    def claimed(self, digest: str) -> Iterator[None]:
        """Keeps the files of `digest` while the block runs; afterwards they go if no version has them. Blocking.

        Waits until nobody removes them: what is published in the block is not to meet a folder that is half gone.
        """
        with self._lock:
            self._lock.wait_for(lambda: digest not in self._removing)
            self._claims[digest] += 1
        try:
            yield
        finally:
            if self._release(digest):
                self.remove_if_unused(digest)

    def remove_if_unused(self, digest: str) -> bool:
        """Removes the files of `digest` unless a version has them or somebody holds a claim. True if they are gone."""
        with self._lock:
            self._lock.wait_for(lambda: digest not in self._removing)
            if self._claims[digest]:
                return False
            self._removing.add(digest)
        try:
            if self._registry.is_published(digest):
                return False
            with self._lock:
                if self._claims[digest]:
                    return False  # whoever claimed it meanwhile finds no version, and removes the files
            self._store.remove_artifact(digest)
            return True
        finally:
            with self._lock:
                self._removing.discard(digest)
                self._lock.notify_all()

    def _claim(self, digest: str) -> None:
        with self._lock:
            self._claims[digest] += 1

    def _release(self, digest: str) -> bool:
        with self._lock:
            self._claims[digest] -= 1
            if self._claims[digest]:
                return False
            del self._claims[digest]
            return True
