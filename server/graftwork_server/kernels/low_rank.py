"""How A and B of low-rank updates lie in memory, as all kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class MemberLora:
    """The B side of one linear layer in a block."""

    ranks: slice
    """Its part of the group's shared A output."""
    columns: slice
    """Its part of the group's output."""
    b: torch.Tensor
    """[slots, rank, out_features], the scaling multiplied in; strides as of a"""


@dataclass(frozen=True)
class GroupLora:
    """A and B of one linear group in a block."""

    a: torch.Tensor
    """[slots, sum of ranks, in_features]; from slot to slot it is the block's slot_elements"""
    members: list[MemberLora]
    description: torch.Tensor
    """The members as the kernels take them (NativeKernels.lora)."""


class LowRankBlock(Protocol):
    """Slots side by side (layers/slots.py), as kernels read them."""

    groups: list[GroupLora | None]
    """By linear group of the base."""
    most_ranks: int
    """No group has more ranks in all."""
