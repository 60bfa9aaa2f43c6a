"""Deltas: the pure data that a strategy hands the engine for serving.

A strategy decides what a variant is; the engine alone decides how it is computed. Further kinds (scales, prefixes,
replaced modules, heads) are added beside these; none is ever changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """y += scaling * (x A^T) B^T on one linear module (LoRA, arXiv:2106.09685).

    `scaling` is the whole factor: alpha / r for LoRA, alpha / sqrt(r) for rsLoRA.
    """

    module: str
    """Dotted name of the base's module, as in named_modules(): "model.layers.0.self_attn.q_proj"."""
    a: torch.Tensor
    """[rank, in_features], floating point, on CPU."""
    b: torch.Tensor
    """[out_features, rank], floating point, on CPU."""
    scaling: float


@dataclass(frozen=True, kw_only=True)
class FullWeights:
    """A whole tuned checkpoint of the base's architecture. Tensors equal to the base's are not held twice."""

    tensors: Mapping[str, torch.Tensor]
    """By name, as in the base's state_dict(); every parameter of the base once, tied ones under either name."""


Delta = LowRank | FullWeights
