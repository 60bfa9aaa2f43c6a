"""Calls of the compiled kernels: addresses and sizes of tensors, no copies.

Tensors must be on the CPU, of the kernels' dtype, and dense in their last dimension; nothing else is checked here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from graftwork_server.kernels.native.build import load_library
from graftwork_server.kernels.native.layer import LayerKernels, packed_elements
from graftwork_server.kernels.native.quantized import QuantizedKernels

_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_P, _I, _D = _POINTER, _INT, _DOUBLE
_SIGNATURES = {
    "lora": (_P, _I, _P, _I, _P, _I, _P, _I, _I, _P, _I, _I, _P, _I),
    "attend": (_P, _P, _P, _P, _P, _P, _P, _I, _D, _I, _D, _I),
    "rms_norm": (_P, _P, _P, _I, _I, _D, _I),
    "silu_mul": (_P, _P, _I, _I, _I),
    "linear": (_P, _P, _P, _P, _P, _I, _I, _I, _I),
    "transpose": (_P, _P, _P, _I, _I),
}
LINEAR_ROWS = 32
"""Rows up to which `linear` in vectors is not slower than torch's GEMM (measured with 576 to 1,536 input features)."""
_PANEL = 32
"""Outputs that a product in tiles computes together (product.h)."""


class NativeKernels:
    """The kernels for one dtype."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.threads = torch.get_num_threads()
        self._lora = _function(library, "lora", dtype)
        self._attend = _function(library, "attend", dtype)
        self._rms_norm = _function(library, "rms_norm", dtype)
        self._silu_mul = _function(library, "silu_mul", dtype)
        self._linear = _function(library, "linear", dtype)
        self.layers = LayerKernels.of(library) if dtype == torch.bfloat16 else None
        """Whole decoder layers, where the processor has the instructions."""
        self._transpose = _function(library, "transpose", dtype)
        self.quantized = QuantizedKernels(library, dtype, self.threads)

    def has_linear(self, x: torch.Tensor, out_features: int) -> bool:
        """Whether `linear` can and should compute a product of x [..., in] with that many outputs."""
        if self._linear is None or self.layers is None or x.numel() == 0:
            return False
        if self.layers.has_tiles and out_features % _PANEL == 0:
            return True
        return out_features % 4 == 0 and x.numel() <= LINEAR_ROWS * x.shape[-1]

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] @ weight [out, in]^T + bias [out]; for few rows (has_linear)."""
        x = x.contiguous()
        out_features, in_features = weight.shape
        y = x.new_empty(*x.shape[:-1], out_features)
        rows = x.numel() // in_features
        packed = x.new_empty(packed_elements(rows, in_features))
        self._linear(
            x.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr() if bias is not None else None,
            y.data_ptr(),
            packed.data_ptr(),
            rows,
            in_features,
            out_features,
            self.threads,
        )
        return y

    def lora(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        spans: torch.Tensor,
        a: torch.Tensor,
        members: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """Adds low-rank deltas to y [rows, out] in place; x [rows, in].

        spans int64 [n, 4]: first row, rows, slot, first row in hidden. a [slots, ranks, in], a slot's part dense.
        members int64 [m, 5]: the address of b [slots, rank, columns], with a's stride from slot to slot, first rank,
        rank, first column, columns. hidden: float32 scratch, at least the rows of all spans times ranks.
        """
        self._lora(
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            y.stride(0),
            spans.data_ptr(),
            spans.shape[0],
            a.data_ptr(),
            a.shape[2],
            a.shape[1],
            members.data_ptr(),
            members.shape[0],
            a.stride(0),
            hidden.data_ptr(),
            self.threads,
        )

    def attend(
        self,
        layer: torch.Tensor,
        step: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Caches the keys and values [kv_heads, tokens, dim] and attends for the decoding rows of query [heads, tokens,
        dim]; the other rows of the answer [tokens, heads, dim] are not set.

        layer int64: addresses of the cache's keys and values [kv_heads, rows, dim], rows, kv_heads, key dim, value dim.
        step int64: address of the packed tokens' cache rows, tokens, addresses of the decoding sequences' packed rows,
        lengths and block tables, how many decode, blocks in a table.
        """
        query, key, value = _dense(query), _dense(key), _dense(value)
        heads, tokens, _ = query.shape
        out = query.new_empty(tokens, heads, value.shape[2])
        strides = torch.tensor([*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]])
        self._attend(
            layer.data_ptr(),
            step.data_ptr(),
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            strides.data_ptr(),
            heads,
            scale,
            window or 0,
            softcap or 0.0,
            self.threads,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., size] / sqrt(mean(x^2) + eps) * weight float32 [size]."""
        x = x.contiguous()
        y = torch.empty_like(x)
        size = weight.shape[0]
        self._rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps, self.threads)
        return y

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate and up side by side: [..., 2 * size], dense -> [..., size]."""
        size = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], size)
        self._silu_mul(gate_up.data_ptr(), y.data_ptr(), y.numel() // size if size else 0, size, self.threads)
        return y

    def transpose(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], scales: Sequence[float]
    ) -> list[bool]:
        """targets[i] = sources[i] [rows, columns]^T * scales[i]; the targets, of as many elements, hold them dense. For
        each, whether all its values are finite. By the calling thread alone (engine/helper_threads.py)."""
        items = [[s.data_ptr(), t.data_ptr(), *s.shape] for s, t in zip(sources, targets, strict=True)]
        table, factors = torch.tensor(items), torch.tensor(scales, dtype=torch.float64)
        finite = torch.empty(len(items), dtype=torch.int64)
        self._transpose(table.data_ptr(), factors.data_ptr(), finite.data_ptr(), len(items), 1)
        return finite.bool().tolist()


def native_kernels(device: torch.device, dtype: torch.dtype) -> NativeKernels | None:
    """The kernels for this device and dtype, or None where there are none or they cannot be compiled."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    library = _library()
    return NativeKernels(library, dtype) if library is not None else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load_library()


def _function(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> Any:
    """The kernel, or None if the processor has no instructions for it."""
    function = getattr(library, f"graftwork_{name}_{str(dtype).removeprefix('torch.')}", None)
    if function is not None:
        function.argtypes, function.restype = _SIGNATURES[name], None
    return function


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
