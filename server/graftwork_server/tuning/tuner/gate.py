"""Training gives way to serving: between micro-batches it waits while the engine has sequences to run."""

from __future__ import annotations

import mmap
import struct
import time

_POLL_SECONDS = 0.002


class Gate:
    """The engine's shared count of running sequences (int64 in an inherited file of 8 bytes)."""

    def __init__(self, fd: int, yield_ms: int) -> None:
        self._count = mmap.mmap(fd, 8, access=mmap.ACCESS_READ)
        self._yield_seconds = yield_ms / 1000

    @property
    def busy(self) -> bool:
        """Whether the engine runs sequences now."""
        count: int = struct.unpack_from("=q", self._count)[0]
        return count != 0

    def wait(self) -> None:
        """Returns once the engine is idle, after `yield_ms` at the latest: training slows down, but never starves."""
        deadline = time.monotonic() + self._yield_seconds
        while self.busy and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_POLL_SECONDS, left))
