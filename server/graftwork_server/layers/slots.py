"""Slots: how loaded adapters lie on the device, and how prepared ones wait in host memory.

Low-rank adapters whose modules have the same ranks form a family; a family's A and B lie in blocks of several slots,
so that different adapters can be computed in one batched GEMM without copying them together. Ranks are true ranks:
nothing is padded to a common maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from graftwork_plugins import LowRank
from graftwork_server.base.host_memory import zeros_on_demand
from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.low_rank import GroupLora, MemberLora
from graftwork_server.kernels.native import NativeKernels

SLOTS_PER_BLOCK = 16
_CACHE_LINE_BYTES = 64
_LARGE_SLOT_BYTES = 2 << 20
"""Bytes of a slot from which large pages are worth their size."""
Ranks = tuple[tuple[int, ...], ...]
"""By linear group, then by its members: the rank of the delta, 0 for none. This is what a family has in common."""
Updates = Sequence[Sequence[LowRank]]
"""By linear group that has any, then by its members that have one."""


class LinearShape(Protocol):
    """Sizes of a group of linear layers with one input."""

    @property
    def in_features(self) -> int:
        """Of the input."""

    @property
    def out_features(self) -> Sequence[int]:
        """Of each member."""


class SlotBlock:
    """Slots of one family, side by side. All that belongs to one slot lies together, in large pages: a step reads it
    from one end to the other."""

    def __init__(self, ranks: Ranks, groups: Sequence[LinearShape], dtype: torch.dtype, device: torch.device) -> None:
        self.ranks = ranks
        self.free = list(range(SLOTS_PER_BLOCK))
        self.unused = set(self.free)
        """Slots whose memory was never written."""
        self.most_ranks = max(map(sum, ranks))
        adapted = [(of_group, group) for of_group, group in zip(ranks, groups, strict=True) if any(of_group)]
        shapes = [(sum(of_group), group.in_features) for of_group, group in adapted]
        owners = list(range(len(adapted)))
        for index, (of_group, group) in enumerate(adapted):
            outs = [(rank, out) for rank, out in zip(of_group, group.out_features, strict=True) if rank]
            shapes += outs
            owners += [index] * len(outs)
        sizes = [math.prod(shape) for shape in shapes]
        places = [_aligned(size, dtype) for size in sizes]
        self.slot_elements = sum(places)
        """Elements from one slot to the next."""
        # A of a group and then its Bs, in the order of the layers: memory is read fastest from one end to the other.
        order = sorted(range(len(shapes)), key=owners.__getitem__)
        # One allocation: hundreds of small ones cost milliseconds.
        pieces = _slots((SLOTS_PER_BLOCK, self.slot_elements), dtype, device).split([places[i] for i in order], dim=1)
        by_place = dict(zip(order, pieces, strict=True))
        self._tensors = [by_place[i][:, : sizes[i]].unflatten(1, shape) for i, shape in enumerate(shapes)]
        """[slots, ...] each: A of every group with ranks, then B of every member with a rank"""
        a, b = iter(self._tensors[: len(adapted)]), iter(self._tensors[len(adapted) :])
        self.groups = [
            _group_lora(next(a), of_group, group, b) if any(of_group) else None
            for of_group, group in zip(ranks, groups, strict=True)
        ]
        self.table = torch.tensor([_table_row(group) for group in self.groups])
        """The groups as the kernels of whole layers take them (LayerKernels)."""

    @property
    def written_bytes(self) -> int:
        """Bytes of the slots that were written at some time."""
        return sum(t.nbytes for t in self._tensors) // SLOTS_PER_BLOCK * (SLOTS_PER_BLOCK - len(self.unused))

    def read(self, slot: int) -> torch.Tensor:
        """A copy of a slot in host memory: [elements], A of each linear group with ranks, then B of their members."""
        packed = torch.cat([piece.view(-1) for piece in self._pieces(slot)])
        return packed if packed.device.type == "cpu" else _page_locked(len(packed), packed.dtype).copy_(packed)

    def write(self, slot: int, updates: Updates, packed: torch.Tensor | None, kernels: NativeKernels | None) -> None:
        """Fills a slot that nobody else uses with `updates`, or with what `read` once made of them."""
        self.unused.discard(slot)
        pieces = self._pieces(slot)
        sizes = [piece.numel() for piece in pieces]
        if packed is None and pieces[0].device.type == "cpu":
            write_updates(updates, pieces, kernels)
            return
        if packed is None:  # converted in host memory, so that one copy crosses over
            packed = _page_locked(sum(sizes), pieces[0].dtype)
            shaped = [part.view_as(piece) for part, piece in zip(packed.split(sizes), pieces, strict=True)]
            write_updates(updates, shaped, None)
        arrived = packed.to(pieces[0].device, non_blocking=True)
        torch._foreach_copy_([piece.view(-1) for piece in pieces], arrived.split(sizes))

    def clear(self, slot: int) -> None:
        """Writes zeros into a slot that nobody else uses, so that its memory is there when an adapter comes."""
        self.unused.discard(slot)
        torch._foreach_zero_(self._pieces(slot))

    def _pieces(self, slot: int) -> list[torch.Tensor]:
        """What lies in a slot: A [sum of ranks, in] and B [rank, out]."""
        return [tensor[slot] for tensor in self._tensors]


def _group_lora(a: torch.Tensor, ranks: tuple[int, ...], group: LinearShape, b: Iterator[torch.Tensor]) -> GroupLora:
    members = []
    rank_offset = column_offset = 0
    for rank, out_features in zip(ranks, group.out_features, strict=True):
        if rank:
            columns = slice(column_offset, column_offset + out_features)
            members.append(MemberLora(slice(rank_offset, rank_offset + rank), columns, next(b)))
        rank_offset += rank
        column_offset += out_features
    return GroupLora(a, members, _description(members))


def write_updates(updates: Updates, targets: list[torch.Tensor], kernels: NativeKernels | None) -> None:
    """Writes A and B * scaling, rounded once, into `targets`: A [sum of ranks, in] of each group, then B [rank, out].

    Raises FailedPrecondition (ARTIFACT_REJECTED) where values are not finite, or not when they are rounded.
    """
    deltas = [delta for of_group in updates for delta in of_group]
    a_targets = [part for of_group, a in zip(updates, targets, strict=False) for part in _rows(a, of_group)]
    b_targets, dtype = targets[len(updates) :], targets[0].dtype
    is_exact = [delta.b.dtype == dtype for delta in deltas]
    sources = [d.b if exact else (d.b.float() * d.scaling).to(dtype) for d, exact in zip(deltas, is_exact, strict=True)]
    scales = [delta.scaling if exact else 1.0 for delta, exact in zip(deltas, is_exact, strict=True)]
    if kernels is None:
        torch._foreach_copy_(a_targets, [delta.a for delta in deltas])
        for b, target, scale in zip(sources, b_targets, scales, strict=True):
            torch.mul(b.t(), scale, out=target)
        finite = [bool(torch.isfinite(target).all()) for target in [*a_targets, *b_targets]]
    else:
        rows = [delta.a.to(dtype).reshape(1, -1) for delta in deltas]
        columns = [b.contiguous() for b in sources]
        finite = kernels.transpose(rows + columns, [*a_targets, *b_targets], [1.0] * len(rows) + scales)
    for index, (delta, is_finite) in enumerate(zip([*deltas, *deltas], finite, strict=True)):
        if not is_finite:
            name = "A" if index < len(deltas) else "B"
            raise FailedPrecondition(
                f"{delta.module}: {name} holds NaN or infinite values, or such that are too large for {dtype}",
                reason="ARTIFACT_REJECTED",
                field=delta.module,
            )


def _rows(a: torch.Tensor, deltas: Sequence[LowRank]) -> Sequence[torch.Tensor]:
    return a.split([delta.a.shape[0] for delta in deltas]) if len(deltas) > 1 else [a]


def _page_locked(elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(elements, dtype=dtype, pin_memory=True)


def _aligned(elements: int, dtype: torch.dtype) -> int:
    """Elements that whole cache lines take."""
    line = _CACHE_LINE_BYTES // dtype.itemsize
    return -(-elements // line) * line


def _slots(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return zeros_on_demand(shape, dtype, large_pages=shape[1] * dtype.itemsize >= _LARGE_SLOT_BYTES)
    return torch.empty(shape, dtype=dtype, device=device)


def _table_row(group: GroupLora | None) -> list[int]:
    if group is None:
        return [0, 0, 0, 0]
    return [group.a.data_ptr(), group.a.shape[1], group.description.data_ptr(), len(group.members)]


def _description(members: list[MemberLora]) -> torch.Tensor:
    return torch.tensor(
        [[m.b.data_ptr(), m.ranks.start, m.ranks.stop - m.ranks.start, m.columns.start, m.b.shape[2]] for m in members]
    )
