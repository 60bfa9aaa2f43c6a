"""The KV cache on CUDA: blocks that attention of decoding sequences is read from where they lie.

Same interface as kv_cache.KVCache, another layout: a token's keys of all heads lie together, as torch's varlen_attn
wants its pages and as the Triton kernels read them.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graftwork_server.kernels.attention.packed import causal_attention
from graftwork_server.kernels.native import NativeKernels
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS, KVCache, LayerShape

if TYPE_CHECKING:
    from graftwork_server.kernels.triton.kernels import TritonKernels

log = logging.getLogger("graftwork.engine")


@dataclass(frozen=True)
class DecodingRows:
    """Sequences that decode one token each, as attention over blocks takes them. All tensors are on the device; in a
    captured graph their addresses stay and their values change."""

    rows: torch.Tensor
    """[sequences] int64: each one's row in the packed input"""
    tables: torch.Tensor
    """[sequences, blocks] int32: the blocks of each, anything behind them that is a block"""
    lengths: torch.Tensor
    """[sequences] int32: tokens of each, the new one included"""
    query_starts: torch.Tensor
    """[sequences + 1] int32: 0, 1, 2, ..."""
    all_rows: bool
    """They are all rows of the forward, in order."""

    @classmethod
    def of(
        cls, rows: Sequence[int], tables: Sequence[Sequence[int]], lengths: Sequence[int], tokens: int
    ) -> DecodingRows:
        """On the CPU, from lists; `tokens` rows are in the forward."""
        blocks = max(-(-length // BLOCK_TOKENS) for length in lengths)
        padded = [[*table[:blocks], *[0] * (blocks - len(table))] for table in tables]
        return cls(
            torch.tensor(rows),
            torch.tensor(padded, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            torch.arange(len(rows) + 1, dtype=torch.int32),
            list(rows) == list(range(tokens)),
        )

    def to(self, device: torch.device) -> DecodingRows:
        """The same on `device`."""
        return DecodingRows(
            self.rows.to(device),
            self.tables.to(device),
            self.lengths.to(device),
            self.query_starts.to(device),
            self.all_rows,
        )


class BlockKVCache:
    """Key and value tensors of each layer, [blocks, BLOCK_TOKENS, kv_heads, dim], with one block more than the pool
    hands out: rows that fill up a captured batch are written there."""

    kernels: NativeKernels | None = None

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        triton: TritonKernels,
        varlen: Callable[..., Any] | None = None,
    ) -> None:
        """varlen: torch's varlen_attn, if it can be used here (usable_varlen)."""
        self.padding_block = num_blocks

        def zeros(shape: LayerShape, dim: int) -> torch.Tensor:
            return torch.zeros(num_blocks + 1, BLOCK_TOKENS, shape.kv_heads, dim, dtype=dtype, device=device)

        self.keys = [zeros(shape, shape.key_dim) for shape in shapes]
        self.values = [zeros(shape, shape.value_dim) for shape in shapes]
        self._triton = triton
        self._varlen = varlen

    def write(self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores key and value [kv_heads, tokens, dim] in cache rows `rows` [tokens]."""
        self.keys[layer].flatten(0, 1).index_copy_(0, rows, key.transpose(0, 1))
        self.values[layer].flatten(0, 1).index_copy_(0, rows, value.transpose(0, 1))

    def clear(self, rows: torch.Tensor) -> None:
        """Zeroes cache rows `rows` [n] in all layers, after a sequence whose values were not finite."""
        for tensor in (*self.keys, *self.values):
            tensor.flatten(0, 1).index_fill_(0, rows, 0)

    def gather(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [kv_heads, n, dim] of cache rows `rows` [n]."""
        keys = self.keys[layer].flatten(0, 1).index_select(0, rows)
        values = self.values[layer].flatten(0, 1).index_select(0, rows)
        return keys.transpose(0, 1), values.transpose(0, 1)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        decoding: DecodingRows,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of the decoding rows of query [heads, tokens, dim], whose keys and values are written already ->
        [sequences, heads, dim]."""
        keys, values, q = self.keys[layer], self.values[layer], query.transpose(0, 1)
        if self._varlen is not None and softcap is None and has_varlen_shape(keys, values):
            rows = q if decoding.all_rows else q[decoding.rows]
            return attend_varlen(self._varlen, rows, keys, values, decoding, scale, window)
        return self._triton.attend(
            q,
            keys,
            values,
            decoding.rows,
            decoding.tables,
            decoding.lengths,
            scale=scale,
            window=window,
            softcap=softcap,
        )


AnyKVCache = KVCache | BlockKVCache


def kv_cache_for(
    shapes: Sequence[LayerShape],
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    kernels: NativeKernels | None,
    triton: TritonKernels | None,
) -> AnyKVCache:
    """The cache for a device: KVCache, or BlockKVCache where there are kernels that read its blocks."""
    if triton is None:
        return KVCache(shapes, num_blocks, dtype, device, kernels)
    return BlockKVCache(
        shapes, num_blocks, dtype, device, triton, usable_varlen(torch_varlen(), shapes[0], dtype, device)
    )


# ---------------------------------------------------------------------------------------------- torch's varlen_attn


def attend_varlen(
    varlen: Callable[..., Any],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decoding: DecodingRows,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """query [sequences, heads, dim], one row for each of `decoding` -> the same shape."""
    output: torch.Tensor = varlen(
        query.contiguous(),
        keys,
        values,
        decoding.query_starts,
        None,
        1,
        decoding.tables.shape[1] * BLOCK_TOKENS,
        scale=scale,
        # The new token is a sequence's last: without a window it sees everything, and causality hides nothing.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=decoding.lengths,
        block_table=decoding.tables,
    )
    return output


def has_varlen_shape(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether FlashAttention takes such heads."""
    dim = keys.shape[3]
    return dim == values.shape[3] and dim % 8 == 0 and dim <= 256 and keys.dtype in (torch.bfloat16, torch.float16)


_VARLEN_ARGUMENTS = {"block_table", "seqused_k", "enable_gqa", "window_size", "scale"}


def torch_varlen() -> Callable[..., Any] | None:
    """torch's varlen_attn, if this torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def usable_varlen(
    varlen: Callable[..., Any] | None, shape: LayerShape, dtype: torch.dtype, device: torch.device
) -> Callable[..., Any] | None:
    """`varlen` if it takes a block table and answers right on this device, else None.

    Taking the argument is not enough: torch 2.13 has it, but only FlashAttention 3 on Hopper and 4 on Blackwell, both
    packages of their own that must have been activated, read blocks. So it is tried once.
    """
    if varlen is None or not set(inspect.signature(varlen).parameters) >= _VARLEN_ARGUMENTS:
        return None
    kv_heads, dim = shape.kv_heads, shape.key_dim
    keys, values = (_draw((8, BLOCK_TOKENS, kv_heads, dim), dtype, device, seed) for seed in (0, 1))
    if shape.value_dim != dim or not has_varlen_shape(keys, values):
        return None
    query = _draw((3, 2 * kv_heads, dim), dtype, device, 2)
    lengths = [1, 20, 37]
    tables = [[7], [3, 6], [1, 4, 0]]
    decoding = DecodingRows.of([0, 1, 2], tables, lengths, 3).to(device)
    try:
        for window in (None, 5):
            answer = attend_varlen(varlen, query, keys, values, decoding, 0.2, window)
            for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
                k, v = (t[table].flatten(0, 1)[:length].transpose(0, 1).float() for t in (keys, values))
                expected = causal_attention(
                    query[row, :, None].float(), k, v, scaling=0.2, sliding_window=window, softcap=None
                )[:, 0]
                if not torch.allclose(answer[row].float(), expected, rtol=2e-2, atol=2e-2):
                    return None
    except Exception as error:  # whatever the implementation behind it raises, it cannot be used
        log.debug("torch's varlen_attn is not used: %s", error)
        return None
    return varlen


def _draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
