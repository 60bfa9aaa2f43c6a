"""How much memory a piece of training takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import pytest


class PeakResidentMemory:
    """Bytes by which this process grew at most within the block; skips the test where Linux does not tell."""

    bytes = 0

    def __enter__(self) -> PeakResidentMemory:
        gc.collect()
        with contextlib.suppress(AttributeError):
            # glibc keeps what was freed; memory used again would not show as growth.
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        except OSError:
            pytest.skip("this system does not tell a process's peak memory")
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = _status("VmHWM") - self._before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
