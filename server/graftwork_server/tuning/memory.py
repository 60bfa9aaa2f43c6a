"""How much memory this process holds at most."""

from __future__ import annotations

import threading
from pathlib import Path

_ROLLUP = Path("/proc/self/smaps_rollup")
_SAMPLE_SECONDS = 0.25


class PeakMemory:
    """Samples the process's proportional set size, in which a page shared with the engine counts half, until
    `stop`; on CUDA, asks torch for the most that was allocated on the device."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)
        if device_type == "cpu":
            self._thread.start()

    def bytes(self) -> int:
        """The peak so far; 0 where the system does not tell."""
        if self._device_type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        self._peak = max(self._peak, proportional_set_size())
        return self._peak

    def stop(self) -> None:
        """Ends the sampling."""
        self._stopped.set()

    def _sample(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, proportional_set_size())


def proportional_set_size() -> int:
    """Bytes of this process, pages shared by n processes counted as an nth; 0 where the system does not tell."""
    try:
        lines = _ROLLUP.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
