"""Memory of the CPU that costs nothing before it is written, in large pages where much is read in every step."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

_LARGE_PAGE = 2 << 20


def zeros_on_demand(shape: Sequence[int], dtype: torch.dtype, *, large_pages: bool = False) -> torch.Tensor:
    """Zeros on the CPU that take memory page by page as they are written; torch.zeros would touch every page at once.

    large_pages: asks the kernel for pages of 2 MiB, so that reading all of it does not wait for a page table walk every
    4 KiB. Worth it where what is written together lies together.
    """
    elements = 1
    for size in shape:
        elements *= size
    memory = mmap.mmap(-1, max(1, elements * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large_pages and len(memory) >= _LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=elements).view(*shape)
