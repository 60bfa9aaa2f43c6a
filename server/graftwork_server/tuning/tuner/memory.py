"""How much memory this process held at most."""

from __future__ import annotations

from pathlib import Path

_ROLLUP = Path("/proc/self/smaps_rollup")
_STATUS = Path("/proc/self/status")


def peak_memory(device_type: str) -> int:
    """Bytes that this process held at most; of pages that n processes share (the base's weights), an nth. On CUDA, what
    torch allocated on the device at most. 0 where the system does not tell.

    The kernel keeps the peak with shared pages counted whole. What they count too much is what it is now: they stay
    from the first step on. Shares are asked for once, as the answer is a walk over every page of the process: 10 ms for
    600 MB, and while it lasts no thread can take or give back memory.
    """
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    whole, shares = _kilobytes(_STATUS, "VmRSS"), _kilobytes(_ROLLUP, "Pss")
    if not whole or not shares:
        return 0
    return (_kilobytes(_STATUS, "VmHWM") - max(0, whole - shares)) * 1024


def _kilobytes(file: Path, field: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
