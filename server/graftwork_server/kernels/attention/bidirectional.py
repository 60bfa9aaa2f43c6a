"""Attention of encoders over packed rows: every token sees all of its row, so there is nothing to cache."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import AttentionInterface

from graftwork_server.kernels.attention.packed import current_rows

NAME = "graftwork_bidirectional"


def bidirectional_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, head_dim] -> ([1, tokens, heads, dim], None).

    With a sliding_window a token sees the sliding_window - 1 tokens before it, and as many behind it. Rows are those of
    packed_rows; neighbours of one length are computed together. Outside it the input is one row.
    """
    cu_seqlens = current_rows() or [0, query.shape[2]]
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    parts, start = [], 0
    for length, members in itertools.groupby(lengths):
        count = len(list(members))
        tokens = slice(start, start + count * length)
        start = tokens.stop
        # [1, heads, count * length, dim] -> [count, heads, length, dim]
        q, k, v = (tensor[0, :, tokens].unflatten(1, (count, length)).transpose(0, 1) for tensor in (query, key, value))
        visible = None
        if sliding_window is not None and length > sliding_window:
            position = torch.arange(length, device=query.device)
            visible = (position[:, None] - position[None, :]).abs() < sliding_window  # [length, length]
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling)
        parts.append(attended.transpose(1, 2).flatten(0, 1))  # [count * length, heads, dim]
    return torch.cat(parts)[None], None


AttentionInterface.register(NAME, bidirectional_attention)
