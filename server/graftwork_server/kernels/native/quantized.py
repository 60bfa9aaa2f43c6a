"""Products with quantised weights (tiles.h, int8.h, nf4.h) as functions of torch tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ROWS = 16
"""Of a tile."""
NF4_ROWS = 64
"""Rows up to which looking the codes up in the product is faster than dequantising the weight before it."""


class QuantizedKernels:
    """The kernels for one dtype; usable only where processor and system have tiles, which AMX brings."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, threads: int) -> None:
        self._threads = threads
        ask = getattr(library, "graftwork_tiles_ready", None)
        ready = ask is not None and bool(ask())
        name = str(dtype).removeprefix("torch.")
        self._int8 = _function(library, f"graftwork_int8_linear_{name}") if ready else None
        self._nf4 = _function(library, f"graftwork_nf4_linear_{name}") if ready else None

    def takes_int8(self, in_features: int, out_features: int) -> bool:
        """Whether `int8_linear` can compute a product of these sizes."""
        return self._int8 is not None and in_features % 64 == 0 and out_features % 16 == 0

    def takes_nf4(self, in_features: int, out_features: int, rows: int) -> bool:
        """Whether `nf4_linear` can and should compute a product of these sizes; there is one for bfloat16 alone."""
        return self._nf4 is not None and in_features % 64 == 0 and out_features % 16 == 0 and 0 < rows <= NF4_ROWS

    def int8_linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., in], weight int8 [out, in], scale float32 [out], bias [out] -> [..., out]. Rows of x are rounded."""
        return self._call(self._int8, x, weight, scale, bias, weight.shape[1] + 4)

    def nf4_linear(
        self, x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., in], codes uint8 [out, in / 2], absmax float32 [out * in / 64], bias [out] -> [..., out]."""
        return self._call(self._nf4, x, codes, absmax, bias, 2 * x.shape[-1])

    def _call(
        self,
        kernel: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        factors: torch.Tensor,
        bias: torch.Tensor | None,
        scratch_bytes: int,
    ) -> torch.Tensor:
        """`scratch_bytes`: what the kernel needs for each row of x, rows filled up to whole tiles."""
        x = x.contiguous()
        out_features, in_features = weight.shape[0], x.shape[-1]
        y = x.new_empty(*x.shape[:-1], out_features)
        rows = x.numel() // in_features
        scratch = torch.empty(-(-rows // _ROWS) * _ROWS * scratch_bytes, dtype=torch.int8)
        kernel(
            x.data_ptr(),
            weight.data_ptr(),
            factors.data_ptr(),
            bias.data_ptr() if bias is not None else None,
            y.data_ptr(),
            scratch.data_ptr(),
            rows,
            in_features,
            out_features,
            self._threads,
        )
        return y


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, name, None)
    if function is not None:
        function.argtypes, function.restype = (*[_POINTER] * 6, *[_INT] * 4), None
    return function
