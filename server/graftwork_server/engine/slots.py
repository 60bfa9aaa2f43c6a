"""Slots: how loaded adapters lie on the device, and how prepared ones wait in host memory.

Low-rank adapters whose modules have the same ranks form a family; a family's A and B lie in blocks of several slots,
so that different adapters can be computed in one batched GEMM without copying them together. Ranks are true ranks:
nothing is padded to a common maximum.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from graftwork_server.types import LoadReport

if TYPE_CHECKING:
    from graftwork_server.engine.adapted_linear import LinearGroup
    from graftwork_server.engine.changes import Changes
    from graftwork_server.engine.model import EngineModel
    from graftwork_server.engine.prefix import PrefixKV

SLOTS_PER_BLOCK = 16

Ranks = tuple[tuple[int, ...], ...]
"""By linear group, then by its members: the rank of the delta, 0 for none. This is what a family has in common."""


@dataclass(frozen=True)
class MemberLora:
    """The B side of one linear layer in a block."""

    ranks: slice
    """Its part of the group's shared A output."""
    columns: slice
    """Its part of the group's output."""
    b: torch.Tensor
    """[slots, rank, out_features], the scaling multiplied in"""


@dataclass(frozen=True)
class GroupLora:
    """A and B of one linear group in a block."""

    a: torch.Tensor
    """[slots, sum of ranks, in_features]"""
    members: list[MemberLora]
    description: torch.Tensor
    """The members as the kernels take them (NativeKernels.lora)."""


class SlotBlock:
    """Slots of one family, side by side."""

    def __init__(self, ranks: Ranks, groups: list[LinearGroup], dtype: torch.dtype, device: torch.device) -> None:
        self.ranks = ranks
        self.groups: list[GroupLora | None] = []
        self.free = list(range(SLOTS_PER_BLOCK))
        self.unused = set(self.free)
        """Slots whose memory was never written."""
        self.most_ranks = max(map(sum, ranks))
        for group_ranks, group in zip(ranks, groups, strict=True):
            if not any(group_ranks):
                self.groups.append(None)
                continue
            a = torch.empty(SLOTS_PER_BLOCK, sum(group_ranks), group.in_features, dtype=dtype, device=device)
            members = []
            rank_offset = column_offset = 0
            for rank, out_features in zip(group_ranks, group.out_features, strict=True):
                if rank:
                    b = torch.empty(SLOTS_PER_BLOCK, rank, out_features, dtype=dtype, device=device)
                    columns = slice(column_offset, column_offset + out_features)
                    members.append(MemberLora(slice(rank_offset, rank_offset + rank), columns, b))
                rank_offset += rank
                column_offset += out_features
            self.groups.append(GroupLora(a, members, _description(members)))

    def read(self, slot: int) -> torch.Tensor:
        """A copy of a slot in host memory: PreparedAdapter.packed."""
        packed = torch.cat(self._pieces(slot))
        return packed if packed.device.type == "cpu" else empty_packed(len(packed), packed.dtype, True).copy_(packed)

    def write(self, slot: int, packed: torch.Tensor) -> None:
        """Fills a slot that nobody else uses. packed [elements]: see PreparedAdapter.packed."""
        self.unused.discard(slot)
        pieces = self._pieces(slot)
        on_device = packed.to(pieces[0].device, non_blocking=True)
        torch._foreach_copy_(pieces, on_device.split([piece.numel() for piece in pieces]))

    def clear(self, slot: int) -> None:
        """Writes zeros into a slot that nobody else uses, so that its memory is there when an adapter comes."""
        self.unused.discard(slot)
        torch._foreach_zero_(self._pieces(slot))

    def _pieces(self, slot: int) -> list[torch.Tensor]:
        """What lies in a slot, flat, in the order of PreparedAdapter.packed."""
        lora = [group for group in self.groups if group is not None]
        tensors = [group.a for group in lora] + [member.b for group in lora for member in group.members]
        return [tensor[slot].view(-1) for tensor in tensors]


def empty_packed(elements: int, dtype: torch.dtype, for_gpu: bool) -> torch.Tensor:
    """Room for PreparedAdapter.packed."""
    return torch.empty(elements, dtype=dtype, pin_memory=for_gpu)


def _description(members: list[MemberLora]) -> torch.Tensor:
    return torch.tensor(
        [[m.b.data_ptr(), m.ranks.start, m.ranks.stop - m.ranks.start, m.columns.start, m.b.shape[2]] for m in members]
    )


@dataclass(frozen=True, kw_only=True)
class PreparedAdapter:
    """An adapter read, checked against the base and converted, ready to be placed. Made off the step loop."""

    digest: str
    modules_bound: int
    rank: int
    parameter_count: int
    device_bytes: int
    ranks: Ranks = ()
    packed: torch.Tensor | None = None
    """[elements] in host memory, page-locked where it goes to a GPU: A [sum of ranks, in] of each linear group with
    ranks, then B [rank, out] of their members with the scaling multiplied in. None without low-rank updates of layers.
    """
    model: EngineModel | None = None
    """A whole tuned checkpoint, bound to a model of its own."""
    changes: Changes = field(default_factory=dict)
    """What it changes beside low-rank products, on the device already."""
    prefix: PrefixKV | None = None
    """Virtual tokens before each sequence, on the device already."""

    @property
    def lies_in_host_memory(self) -> bool:
        """Nothing of it is on the device yet."""
        return self.model is None and not self.changes and self.prefix is None


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter on the device."""

    prepared: PreparedAdapter
    """As it came, without `packed`."""
    report: LoadReport
    block: SlotBlock | None
    slot: int
    leases: int = 0

    def __post_init__(self) -> None:
        self.digest = self.prepared.digest
        self.bytes = self.prepared.device_bytes
        self.model = self.prepared.model
        self.changes = self.prepared.changes
        self.prefix = self.prepared.prefix

    def forget(self) -> None:
        """Lets go of what it holds on the device, whoever may still have this object."""
        self.prepared = replace(self.prepared, model=None, changes={}, prefix=None)
        self.block = None
        self.model, self.changes, self.prefix = None, {}, None
