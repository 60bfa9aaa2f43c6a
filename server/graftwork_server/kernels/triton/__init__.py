"""The engine's own CUDA kernels, in Triton: low-rank updates of any mix of adapters, and attention from cache blocks.

Triton is imported where a CUDA device is used and nowhere else. TRITON_INTERPRET=1 runs the same kernels on the CPU,
slowly; that is how their mathematics is tested on machines without a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from graftwork_server.kernels.triton.kernels import TritonKernels

log = logging.getLogger("graftwork.engine")


def triton_kernels(
    device: torch.device, dtype: torch.dtype, out_features: Sequence[Sequence[int]]
) -> TritonKernels | None:
    """The kernels for this device and dtype, or None, with a line in the log, where there are none.

    out_features: by linear group, of its members."""
    if device.type != "cuda" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if importlib.util.find_spec("triton") is None:
        log.warning("triton is not installed, so the CUDA kernels are torch's own, which are slower")
        return None
    from graftwork_server.kernels.triton.kernels import TritonKernels

    return TritonKernels(dtype, out_features)
