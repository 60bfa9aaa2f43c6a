"""Attention over packed rows for training and for probes: causal within each row, differentiable, no KV cache."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

NAME = "graftwork_packed"

_state = threading.local()


@contextmanager
def packed_rows(cu_seqlens: Sequence[int]) -> Iterator[None]:
    """Within it, models that run the attention NAME see rows [cu_seqlens[i], cu_seqlens[i + 1]) as sequences.

    Keep it open around forward and backward of one batch.
    """
    previous = current_rows()
    _state.cu_seqlens = list(cu_seqlens)
    try:
        yield
    finally:
        _state.cu_seqlens = previous


def current_rows() -> list[int] | None:
    """cu_seqlens of the packed_rows that this thread is in."""
    return getattr(_state, "cu_seqlens", None)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one sequence's last n tokens over all its m >= n tokens.

    query [heads, n, head_dim], key and value [kv_heads, m, dim]; returns [heads, n, dim]. A token sees itself and the
    sliding_window - 1 tokens before it, or all before it.
    """
    n, m = query.shape[1], key.shape[1]
    windowed = sliding_window is not None and m > sliding_window
    if softcap is None and not windowed and n == m:
        return torch.nn.functional.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            is_causal=True,
            scale=scaling,
            enable_gqa=key.shape[0] != query.shape[0],
        )[0]
    q_position = torch.arange(m - n, m, device=query.device)[:, None]
    k_position = torch.arange(m, device=query.device)[None, :]
    visible = k_position <= q_position  # [n, m]
    if windowed and sliding_window is not None:
        visible &= k_position > q_position - sliding_window
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=visible,
            scale=scaling,
            enable_gqa=key.shape[0] != query.shape[0],
        )[0]
    groups = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.float().masked_fill(~visible, float("-inf")).softmax(-1).to(value.dtype)
    return weights @ value.repeat_interleave(groups, 0)


def packed_attention(
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
    """transformers' attention interface: query [1, heads, tokens, head_dim] -> ([1, tokens, heads, dim], None).

    Outside packed_rows the whole input is one row. Attention dropout is not applied: the base is frozen in evaluation
    mode, and tuned copies train without it.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    cu_seqlens = current_rows() or [0, query.shape[2]]
    rows = [
        causal_attention(
            query[0, :, start:end],
            key[0, :, start:end],
            value[0, :, start:end],
            scaling=scale,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        for start, end in itertools.pairwise(cu_seqlens)
    ]
    return torch.cat(rows, dim=1).transpose(0, 1)[None], None


AttentionInterface.register(NAME, packed_attention)
