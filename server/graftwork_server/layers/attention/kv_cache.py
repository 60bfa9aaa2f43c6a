"""The KV cache: keys and values of all sequences in blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftwork_server.base.host_memory import zeros_on_demand
from graftwork_server.kernels.native import KV_BLOCK_TOKENS, NativeKernels

BLOCK_TOKENS = KV_BLOCK_TOKENS
"""Tokens in a block."""


@dataclass(frozen=True)
class LayerShape:
    """Key and value of one attention layer."""

    kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one token takes in this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class KVCache:
    """Key and value tensors of each layer, [kv_heads, block slots, dim].

    Heads come first so that gathering the rows of several sequences gives [kv_heads, sequences, tokens, dim], on which
    attention is a plain batched GEMM. On CPU the memory is taken page by page as blocks are first written. Rows start
    as zeros and must stay finite: masked positions are read, and NaN times zero is NaN.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: NativeKernels | None = None,
    ) -> None:
        self.kernels = kernels
        """What decodes from this cache, if it is not torch."""
        rows = num_blocks * BLOCK_TOKENS
        self.keys = [_zeros((s.kv_heads, rows, s.key_dim), dtype, device) for s in shapes]
        self.values = [_zeros((s.kv_heads, rows, s.value_dim), dtype, device) for s in shapes]
        self.layers = [
            torch.tensor([k.data_ptr(), v.data_ptr(), rows, s.kv_heads, s.key_dim, s.value_dim])
            for k, v, s in zip(self.keys, self.values, shapes, strict=True)
        ]
        """Each layer as the kernels take it (NativeKernels.attend)."""

    def write(self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores key and value [kv_heads, tokens, dim] in cache rows `rows` [tokens]."""
        self.keys[layer].index_copy_(1, rows, key)
        self.values[layer].index_copy_(1, rows, value)

    def clear(self, rows: torch.Tensor) -> None:
        """Zeroes cache rows `rows` [n] in all layers, after a sequence whose values were not finite."""
        for tensor in (*self.keys, *self.values):
            tensor.index_fill_(1, rows, 0)

    def gather(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [kv_heads, n, dim] of cache rows `rows` [n]."""
        return self.keys[layer].index_select(1, rows), self.values[layer].index_select(1, rows)


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return zeros_on_demand(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def rows_of(block_table: Sequence[int], start: int, end: int) -> list[int]:
    """Cache rows of a sequence's tokens [start, end)."""
    return [
        block_table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS for position in range(start, end)
    ]
