"""Copies from host memory into the device pool, off the step loop.

On CUDA they go through pinned buffers over a stream of their own, so that a load neither waits for the step that runs
nor holds it up: a copy from memory that is not pinned would stand in the step's own stream until it is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

_HALF_BYTES = 8 << 20
"""One of the two pinned buffers: one is filled while the other is being copied from."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Where to, and what: dense tensors of the same shape and dtype, the second on the CPU."""


class Copies(Protocol):
    """A way of copying to one device."""

    def copy(self, pairs: Iterable[Pair]) -> None:
        """Returns when everything is there."""


class PlainCopies:
    """On the CPU."""

    def copy(self, pairs: Iterable[Pair]) -> None:
        """See Copies."""
        for target, source in pairs:
            target.copy_(source)


class StagedCopies:
    """To a CUDA device. Thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._halves = [torch.empty(_HALF_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._lock = threading.Lock()

    def copy(self, pairs: Iterable[Pair]) -> None:
        """See Copies. The calling thread waits, the step loop does not: were the adapter handed out before it is
        there, a step that has one row of it would make all its other rows wait on the device."""
        half, used = 0, 0
        with self._lock, torch.cuda.stream(self._stream):
            # A step under way may still read the slot's former adapter, or memory that its block was made from.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            for target, source in pieces(pairs, _HALF_BYTES):
                if used + len(source) > _HALF_BYTES:
                    self._copied[half].record(self._stream)
                    half, used = 1 - half, 0
                    self._copied[half].synchronize()
                staged = self._halves[half][used : used + len(source)]
                staged.copy_(source)
                target.copy_(staged, non_blocking=True)
                used += len(source)
            self._stream.synchronize()


def copies_to(device: torch.device) -> Copies:
    """The way of copying to `device`."""
    return StagedCopies(device) if device.type == "cuda" else PlainCopies()


def pieces(pairs: Iterable[Pair], most_bytes: int) -> Iterator[Pair]:
    """The pairs as uint8 [n] with n <= most_bytes each, in order."""
    for target, source in pairs:
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(f"{source.dtype} {list(source.shape)} does not fit {target.dtype} {list(target.shape)}")
        to, of = target.view(-1).view(torch.uint8), source.contiguous().view(-1).view(torch.uint8)
        yield from zip(to.split(most_bytes), of.split(most_bytes), strict=True)
