"""What every reader of tensors asks: which of them transformers computes anew, and whether all values are finite."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_POSITIONS = re.compile(
    r"(.+\.)?((rotary_emb|rotary_pos_emb|rope)\.(original_)?(inv_freq|cos_cached|sin_cached)|position_ids"
    r"|embeddings\.token_type_ids)"
)
"""Of the configuration: rotary frequencies and their tables, the numbers of positions."""
_MASKS = re.compile(r"(.+\.)?(attn|attention|self_attn|self|crossattention)\.(bias|masked_bias|causal_mask)")
"""Causal masks, in GPT-2, GPT-J, GPT-NeoX and CodeGen, and what they put where nothing is seen."""


def without_derived(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` by name, less those that transformers derives itself (buffers that earlier versions saved)."""
    return {name: tensor for name, tensor in tensors.items() if not _is_derived(name, tensor)}


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a floating point tensor is NaN or infinite."""
    import torch

    # A finite sum has finite terms, and costs a tenth of isfinite. One that is not finite may just have overflowed.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _is_derived(name: str, tensor: torch.Tensor) -> bool:
    # A mask has no dimensions or four; a bias that is trained is a vector.
    return bool(_POSITIONS.fullmatch(name) or (_MASKS.fullmatch(name) and tensor.ndim != 1))
