"""The kernels of whole decoder layers (layer.h): the structures that they take, and their calls.

Addresses are of tensors that the caller keeps alive. Everything is bfloat16 but what is said to be another type.
"""

from __future__ import annotations

import ctypes
from typing import Self

import torch

_TILE = 16, 32
"""Rows and elements of a block of packed input (product.h)."""
SLACK_ROWS = 16
"""Rows after the last that a product in tiles may read, whatever is in them."""


class LayerStruct(ctypes.Structure):
    """`Layer` of layer.h: weights, sizes and constants of one layer."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, ctypes.c_void_p) for name in ("qkv", "qkv_bias", "o", "o_bias")),
        *((name, ctypes.c_void_p) for name in ("gate_up", "gate_up_bias", "down", "down_bias")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "window")),
        *((name, ctypes.c_int64) for name in ("qkv_group", "o_group", "gate_up_group", "down_group")),
        *((name, ctypes.c_double) for name in ("eps", "qk_eps", "scale")),
    ]


class SpansStruct(ctypes.Structure):
    """`Spans` of layer.h: rows of adapters in one block of slots."""

    _fields_ = [
        ("groups", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("n_spans", ctypes.c_int64),
        ("slot_elements", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
    ]


class StepStruct(ctypes.Structure):
    """`Step` of layer.h: what all layers of one forward have in common."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "attention", "spans")),
        ("n_spans", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("packed", "normed", "product", "gate_up", "inner")),
        ("threads", ctypes.c_int64),
    ]


class LayerKernels:
    """The calls. has_tiles: products have any number of rows; else at most LINEAR_ROWS."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.graftwork_prepare.restype = ctypes.c_int64
        self.has_tiles = bool(library.graftwork_prepare())
        self._attend = library.graftwork_layer_attend
        self._attend.argtypes, self._attend.restype = [ctypes.c_void_p] * 6, None
        self._finish = library.graftwork_layer_finish
        self._finish.argtypes, self._finish.restype = [ctypes.c_void_p] * 5, None

    @classmethod
    def of(cls, library: ctypes.CDLL) -> Self | None:
        """The calls, or None if the processor has no instructions for them."""
        return cls(library) if hasattr(library, "graftwork_layer_attend") else None

    def attend(
        self, layer: int, step: int, cache: torch.Tensor, x: torch.Tensor, qkv: torch.Tensor, attended: torch.Tensor
    ) -> None:
        """x [rows, hidden] -> qkv [rows, (heads + 2 kv_heads) * head_dim], keys and values cached; and attended [rows,
        heads * head_dim] for the rows that decode. layer, step: addresses of the structures; cache: KVCache.layers."""
        self._attend(layer, step, cache.data_ptr(), x.data_ptr(), qkv.data_ptr(), attended.data_ptr())

    def finish(self, layer: int, step: int, x: torch.Tensor, attended: torch.Tensor, y: torch.Tensor) -> None:
        """attended [rows, heads * head_dim] and x [rows, hidden] -> y [rows, hidden], the layer's output."""
        self._finish(layer, step, x.data_ptr(), attended.data_ptr(), y.data_ptr())


def packed_elements(rows: int, in_features: int) -> int:
    """Elements of rows x in_features in blocks of tiles."""
    return -(-rows // _TILE[0]) * -(-in_features // _TILE[1]) * _TILE[0] * _TILE[1]
