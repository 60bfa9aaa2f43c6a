"""Between host and device: values that go over without a wait, and all that a step brings back in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]


class Readback:
    """Tensors of one step. float64 holds each value of theirs exactly: ids, flags and float32 numbers."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor) -> int:
        """Asks for a tensor; what is returned finds it in what `read` returns."""
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def read(self) -> list[Array]:
        """The tensors' values, in the order in which they were added; waits for the device."""
        if all(tensor.device.type == "cpu" for tensor in self._tensors):
            return [tensor.numpy() for tensor in self._tensors]
        packed = torch.cat([tensor.reshape(-1).double() for tensor in self._tensors]).cpu().numpy()
        ends = np.cumsum([tensor.numel() for tensor in self._tensors])
        parts = np.split(packed, ends[:-1])
        return [part.reshape(tensor.shape) for part, tensor in zip(parts, self._tensors, strict=True)]


def on_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of host values; on CUDA without a wait for what the device still has to do."""
    return sent(torch.tensor(values, dtype=dtype), device)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`; without a wait, as on_device."""
    # From pageable memory, CUDA would copy only once the device has done all that came before.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
