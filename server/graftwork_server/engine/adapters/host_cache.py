"""Adapters in host memory, between device and disk: what was evicted comes back without being read and checked."""

from __future__ import annotations

import threading
from collections import OrderedDict

from graftwork_server.layers.binding.prepared import PreparedAdapter


class HostCache:
    """Prepared adapters by digest, the last used ones kept. An adapter is here or on the device. Thread-safe."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._adapters: OrderedDict[str, PreparedAdapter] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def put(self, adapter: PreparedAdapter) -> None:
        """Keeps an adapter, in place of the least recently used ones; not at all if it is larger than the cache."""
        if adapter.device_bytes > self.budget_bytes:
            return
        with self._lock:
            self._remove(adapter.digest)
            while self.used_bytes + adapter.device_bytes > self.budget_bytes:
                self._remove(next(iter(self._adapters)))
            self._adapters[adapter.digest] = adapter
            self.used_bytes += adapter.device_bytes

    def take(self, digest: str) -> PreparedAdapter | None:
        """The adapter, which is not kept here any longer; None if it is not here."""
        with self._lock:
            return self._remove(digest)

    def discard(self, digest: str) -> None:
        """Forgets an adapter, if it is here."""
        self.take(digest)

    def digests(self) -> list[str]:
        """What is here now, least recently used first."""
        with self._lock:
            return list(self._adapters)

    def _remove(self, digest: str) -> PreparedAdapter | None:
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self.used_bytes -= adapter.device_bytes
        return adapter
