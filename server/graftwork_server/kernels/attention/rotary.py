"""Rotary embeddings whose frequencies depend on the length of a sequence, over packed rows of several sequences.

transformers chooses the factors of LongRoPE (Phi-3 128k, Phi-4-mini) for a whole forward, by its largest position. That
is right for a sequence that is alone; here each row gets those of its own sequence, as if that were alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from graftwork_server.kernels.attention.packed import current_rows

_state = threading.local()


@contextmanager
def sequence_lengths(lengths: torch.Tensor) -> Iterator[None]:
    """Within it, the packed rows of this thread's forward belong to sequences of so many tokens: lengths [rows].

    Outside of it, a sequence is as long as its largest position says: each of packed_rows, or else the whole input.
    """
    _state.lengths = lengths
    try:
        yield
    finally:
        _state.lengths = None


class RotaryByLength(torch.nn.Module):
    """transformers' rotary embedding, asked twice: for what is within the original context, and for what is beyond."""

    def __init__(self, rotary: torch.nn.Module, borders: Mapping[str | None, int]) -> None:
        """borders: by type of layer (None: there are no types), up to how many tokens a sequence has the first
        factors."""
        super().__init__()
        self.rotary = rotary
        self.borders = dict(borders)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """x for its dtype, position_ids [1, rows] -> cos and sin [1, rows, dim]."""
        kinds = () if layer_type is None else (layer_type,)
        if layer_type not in self.borders:
            return self.rotary(x, position_ids, *kinds)
        border = self.borders[layer_type]
        is_long = _lengths(position_ids) > border
        short = self.rotary(x, position_ids.masked_fill(is_long, 0), *kinds)
        # One position more than there are rows: it alone makes the whole input a long one.
        beyond = torch.cat([position_ids, position_ids.new_full((len(position_ids), 1), border)], dim=1)
        long = self.rotary(x, beyond, *kinds)
        return tuple(torch.where(is_long[..., None], b[:, :-1], a) for a, b in zip(short, long, strict=True))


def _lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """[1, rows]: tokens of the sequence that each row belongs to."""
    given: torch.Tensor | None = getattr(_state, "lengths", None)
    if given is not None:
        return given[None]
    cu_seqlens = current_rows()
    if cu_seqlens is None:
        return position_ids.amax(1, keepdim=True) + 1
    counts = torch.tensor(cu_seqlens, device=position_ids.device).diff()
    rows = torch.arange(len(counts), device=position_ids.device).repeat_interleave(counts)
    largest = position_ids.new_zeros(len(counts)).scatter_reduce(0, rows, position_ids[0], "amax")
    return largest[rows][None] + 1


def rotate_by_length(model: torch.nn.Module) -> bool:
    """Replaces the model's rotary embeddings that look at the longest position of a forward.

    Dynamic NTK scaling, which begins beyond max_position_embeddings, where the context ends, is switched off: then no
    row can bring it upon others. True if there was any.
    """
    is_dynamic = False
    for name, module in list(model.named_modules()):
        kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
        if config is None or not isinstance(kinds, str | dict):
            continue
        by_layer: dict[str | None, str] = {None: kinds} if isinstance(kinds, str) else kinds
        is_dynamic |= any("dynamic" in kind for kind in by_layer.values())
        fixed = {layer: "default" if "dynamic" in kind else kind for layer, kind in by_layer.items()}
        module.rope_type = fixed[None] if isinstance(kinds, str) else fixed
        parameters = config.rope_parameters
        borders = {
            layer: int((parameters if layer is None else parameters[layer])["original_max_position_embeddings"])
            for layer, kind in by_layer.items()
            if kind == "longrope"
        }
        if borders:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, RotaryByLength(module, borders))
    return is_dynamic


def rope_borders(model: torch.nn.Module) -> tuple[int, ...]:
    """Lengths, in order, up to which a sequence of the model has other frequencies than beyond."""
    found = {
        border for module in model.modules() if isinstance(module, RotaryByLength) for border in module.borders.values()
    }
    return tuple(sorted(found))
