"""The product with int8 weights (int8.h) as a function of torch tensors."""

from __future__ import annotations

import ctypes

import torch

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ROWS = 16
"""Of a tile."""


class Int8Kernel:
    """The kernel for one dtype; usable only where `ready`."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, threads: int) -> None:
        self._threads = threads
        ask = getattr(library, "graftwork_int8_ready", None)
        self.ready = ask is not None and bool(ask())
        """Whether processor and system have the instructions."""
        if self.ready:
            self._linear = getattr(library, f"graftwork_int8_linear_{str(dtype).removeprefix('torch.')}")
            self._linear.argtypes, self._linear.restype = (*[_POINTER] * 6, *[_INT] * 4), None

    def takes(self, in_features: int, out_features: int) -> bool:
        """Whether it can compute a product of these sizes."""
        return self.ready and in_features % 64 == 0 and out_features % 16 == 0

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., in], weight int8 [out, in], scale float32 [out], bias [out] -> [..., out]. Rows of x are rounded."""
        x = x.contiguous()
        out_features, in_features = weight.shape
        y = x.new_empty(*x.shape[:-1], out_features)
        rows = x.numel() // in_features
        if rows == 0:
            return y
        tiles = -(-rows // _ROWS)
        scratch = torch.empty(tiles * _ROWS * (in_features + 4), dtype=torch.int8)
        self._linear(
            x.data_ptr(),
            weight.data_ptr(),
            scale.data_ptr(),
            bias.data_ptr() if bias is not None else None,
            y.data_ptr(),
            scratch.data_ptr(),
            rows,
            in_features,
            out_features,
            self._threads,
        )
        return y
