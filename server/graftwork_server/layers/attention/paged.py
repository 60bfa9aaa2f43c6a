"""Attention of packed tokens of many sequences against the paged KV cache.

Sequences that decode one token are computed together: their cached keys and values are gathered into one padded batch,
and attention is two batched GEMMs without expanding grouped heads. Sequences of very different lengths go into
different batches, so that short ones do not pay for long ones. Prefill chunks are computed sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from graftwork_server.kernels.attention.packed import causal_attention
from graftwork_server.layers.attention.block_kv_cache import AnyKVCache, BlockKVCache, DecodingRows
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS, KVCache, rows_of

NAME = "graftwork_paged"


@dataclass
class DecodeBatch:
    """Sequences of similar length that decode one token each."""

    queries: slice | torch.Tensor
    """Their rows in the packed input."""
    count: int
    longest: int
    kv_rows: torch.Tensor
    """[count * longest] cache rows; padding repeats row 0 of the cache and is masked."""
    lengths: torch.Tensor
    """[count, 1, 1] tokens of each, the new one included"""
    biases: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        """[kv_heads * count, 1, longest]: 0 where a token is visible, -inf elsewhere. The same for all layers."""
        if (window, kv_heads) not in self.biases:
            position = torch.arange(self.longest, device=self.lengths.device)
            hidden = position >= self.lengths  # [count, 1, longest]
            if window is not None:
                hidden |= position < self.lengths - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self.biases[window, kv_heads] = bias.repeat(kv_heads, 1, 1)
        return self.biases[window, kv_heads]


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of the packed input, the newest of a sequence."""

    start: int
    end: int
    kv_rows: torch.Tensor | None
    """Cache rows of all the sequence's tokens up to these; None if these are its first."""


class NativeStep:
    """What the kernels need to know of a step (NativeKernels.attend)."""

    def __init__(self, new_rows: torch.Tensor, decoding: Sequence[tuple[int, Chunk]]) -> None:
        blocks = max((-(-(chunk.start + 1) // BLOCK_TOKENS) for _, chunk in decoding), default=0)
        rows = torch.tensor([row for row, _ in decoding])
        lengths = torch.tensor([chunk.start + 1 for _, chunk in decoding])
        tables = torch.tensor(
            [[*chunk.block_table[:blocks], *[0] * (blocks - len(chunk.block_table))] for _, chunk in decoding]
        )
        self._alive = (new_rows, rows, lengths, tables)
        new, *others = (tensor.data_ptr() for tensor in self._alive)
        self.description = torch.tensor([new, len(new_rows), *others, len(decoding), blocks])


@dataclass
class AttentionPlan:
    """How the packed tokens of one forward attend; made once, used by every layer."""

    cache: AnyKVCache
    new_rows: torch.Tensor
    """[tokens] cache rows that the packed tokens' keys and values are written to"""
    decode: list[DecodeBatch]
    prefill: list[PrefillChunk]
    native: NativeStep | None = None
    """Set if the cache has kernels; they write all keys and values and decode, and `decode` is empty."""
    layer_step: Any = None
    """What whole layers computed by kernels share in this forward (fused_layers.py)."""
    blocks: DecodingRows | None = None
    """Set if sequences decode from a BlockKVCache; `decode` is empty then."""


@dataclass(frozen=True)
class Chunk:
    """Part of a sequence in a forward: tokens [start, start + count) of it."""

    block_table: Sequence[int]
    start: int
    count: int


def plan_attention(cache: AnyKVCache, chunks: Sequence[Chunk], device: torch.device) -> AttentionPlan:
    """The plan for `chunks`, packed in this order."""
    new_rows: list[int] = []
    prefill: list[PrefillChunk] = []
    by_length: dict[int, list[tuple[int, Chunk]]] = {}
    row = 0
    for chunk in chunks:
        new_rows.extend(rows_of(chunk.block_table, chunk.start, chunk.start + chunk.count))
        if chunk.count == 1 and chunk.start > 0:
            bucket = max(chunk.start, 4 * BLOCK_TOKENS).bit_length()
            by_length.setdefault(bucket, []).append((row, chunk))
        else:
            context = None
            if chunk.start > 0:
                context = torch.tensor(rows_of(chunk.block_table, 0, chunk.start + chunk.count), device=device)
            prefill.append(PrefillChunk(row, row + chunk.count, context))
        row += chunk.count
    if cache.kernels is not None:
        rows = torch.tensor(new_rows)
        decoding = [member for members in by_length.values() for member in members]
        return AttentionPlan(cache, rows, [], prefill, NativeStep(rows, decoding))
    if isinstance(cache, BlockKVCache):
        decoding = [member for members in by_length.values() for member in members]
        blocks = _decoding_rows(decoding, row).to(device) if decoding else None
        return AttentionPlan(cache, torch.tensor(new_rows, device=device), [], prefill, blocks=blocks)
    decode = [_decode_batch(members, device) for members in by_length.values()]
    return AttentionPlan(cache, torch.tensor(new_rows, device=device), decode, prefill)


def _decoding_rows(members: list[tuple[int, Chunk]], tokens: int) -> DecodingRows:
    members = sorted(members, key=lambda member: member[0])
    tables = [chunk.block_table for _, chunk in members]
    lengths = [chunk.start + 1 for _, chunk in members]
    return DecodingRows.of([row for row, _ in members], tables, lengths, tokens)


def _decode_batch(members: list[tuple[int, Chunk]], device: torch.device) -> DecodeBatch:
    rows = [row for row, _ in members]
    queries: slice | torch.Tensor = slice(rows[0], rows[0] + len(rows))
    if rows != list(range(rows[0], rows[0] + len(rows))):
        queries = torch.tensor(rows, device=device)
    lengths = [chunk.start + 1 for _, chunk in members]
    longest = max(lengths)
    blocks = -(-longest // BLOCK_TOKENS)
    tables = torch.tensor(
        [[*chunk.block_table[:blocks], *[0] * (blocks - len(chunk.block_table))] for _, chunk in members]
    )
    kv_rows = (tables[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).view(len(members), -1)[:, :longest]
    return DecodeBatch(
        queries,
        len(members),
        longest,
        kv_rows.reshape(-1).to(device),
        torch.tensor(lengths, device=device)[:, None, None],
    )


_plan: AttentionPlan | None = None
"""The plan of the forward that runs now. One engine process runs one forward at a time, in its step thread."""


def set_plan(plan: AttentionPlan | None) -> None:
    """Makes `plan` the one that the next forward follows."""
    global _plan
    _plan = plan


def current_plan() -> AttentionPlan | None:
    """The plan of the forward that runs now."""
    return _plan


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, head_dim] -> ([1, tokens, heads, dim], None)."""
    plan = _plan
    if plan is None:
        raise RuntimeError("no attention plan is set for this forward")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = query[0], key[0], value[0]  # [heads, tokens, dim]
    # output [tokens, heads, dim]
    if plan.native is not None and isinstance(plan.cache, KVCache) and plan.cache.kernels is not None:
        output = plan.cache.kernels.attend(
            plan.cache.layers[layer], plan.native.description, query, key, value, scale, sliding_window, softcap
        )
    else:
        plan.cache.write(layer, plan.new_rows, key, value)
        output = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    if plan.blocks is not None:
        assert isinstance(plan.cache, BlockKVCache)  # as plan_attention made it
        attended = plan.cache.attend(layer, query, plan.blocks, scale, sliding_window, softcap)
        if plan.blocks.all_rows:
            return attended[None], None
        output[plan.blocks.rows] = attended
    for batch in plan.decode:
        output[batch.queries] = _decode(plan.cache, layer, batch, query, scale, sliding_window, softcap)
    attend_prompts(plan, layer, query, key, value, output, scale, sliding_window, softcap)
    return output[None], None


def attend_prompts(
    plan: AttentionPlan,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Attends for the plan's prefill chunks: query [heads, tokens, dim], key and value [kv_heads, tokens, dim] of all
    packed tokens, cached already; the chunks' rows of output [tokens, heads, dim] are set."""
    for chunk in plan.prefill:
        k, v = key[:, chunk.start : chunk.end], value[:, chunk.start : chunk.end]
        if chunk.kv_rows is not None:
            k, v = plan.cache.gather(layer, chunk.kv_rows)
        attended = causal_attention(
            query[:, chunk.start : chunk.end], k, v, scaling=scale, sliding_window=window, softcap=softcap
        )
        output[chunk.start : chunk.end] = attended.transpose(0, 1)


def _decode(
    cache: AnyKVCache,
    layer: int,
    batch: DecodeBatch,
    query: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """query [heads, tokens, head_dim] of all tokens -> [count, heads, dim] of the batch's."""
    keys, values = cache.gather(layer, batch.kv_rows)  # [kv_heads, count * longest, dim]
    kv_heads, _, key_dim = keys.shape
    groups = query.shape[0] // kv_heads
    # [kv_heads, groups, count, dim] -> [kv_heads * count, groups, dim]
    q = query[:, batch.queries].view(kv_heads, groups, batch.count, key_dim).transpose(1, 2)
    q = q.reshape(kv_heads * batch.count, groups, key_dim)
    k = keys.view(kv_heads * batch.count, batch.longest, key_dim)
    v = values.view(kv_heads * batch.count, batch.longest, -1)
    bias = batch.bias(window, kv_heads, torch.float32 if softcap is not None else q.dtype)
    if softcap is None:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)  # [kv_heads * count, groups, longest]
    else:
        scores = softcap * torch.tanh(torch.bmm(q, k.transpose(1, 2)).float() * (scale / softcap)) + bias
    attended = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
    return attended.view(kv_heads, batch.count, groups, -1).transpose(0, 1).reshape(batch.count, query.shape[0], -1)


AttentionInterface.register(NAME, paged_attention)
