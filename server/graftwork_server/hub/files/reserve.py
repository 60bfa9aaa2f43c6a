"""Room on the disk that is kept for what makes room."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

RESERVE = "reserve"
"""Name of the file, beside the registry."""
RESERVE_BYTES = 4 << 20
_LARGEST_SHARE = 8
"""At most an eighth of a small disk."""
_LEAST_BYTES = 64 << 10


class Reserve:
    """A file that takes room away, so that there is some when the disk is full. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.held = False
        self.keep()

    def keep(self) -> None:
        """Takes the room, if it is not taken; less where the disk does not have as much."""
        with self._lock:
            if self.held:
                return
            with contextlib.suppress(OSError):
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                try:
                    disk = os.fstatvfs(descriptor)
                    size = min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // _LARGEST_SHARE)
                    while not self.held and size >= _LEAST_BYTES:
                        self.held = _take(descriptor, size)
                        size //= 2
                finally:
                    os.close(descriptor)
            if not self.held:
                self._path.unlink(missing_ok=True)

    def give(self) -> None:
        """Lets others have the room."""
        with self._lock:
            self._path.unlink(missing_ok=True)
            self.held = False


def _take(descriptor: int, size: int) -> bool:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        os.ftruncate(descriptor, 0)
        return False
    return True
