"""The device pool: places for loaded adapters, sized in bytes, with leases and least-recently-used eviction.

Low-rank adapters whose modules have the same ranks form a family; a family's A and B lie in blocks of several slots,
so that different adapters can be computed in one batched GEMM without copying them together. Ranks are true ranks:
nothing is padded to a common maximum.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from graftwork_server.engine.staging import Pair, copies_to
from graftwork_server.errors import ResourceExhausted
from graftwork_server.types import LoadReport

if TYPE_CHECKING:
    from graftwork_server.engine.adapted_linear import LinearGroup
    from graftwork_server.engine.changes import Changes
    from graftwork_server.engine.model import EngineModel
    from graftwork_server.engine.prefix import PrefixKV

_SLOTS_PER_BLOCK = 16

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
        self.groups: list[GroupLora | None] = []
        self.free = list(range(_SLOTS_PER_BLOCK))
        self.most_ranks = max(map(sum, ranks))
        for group_ranks, group in zip(ranks, groups, strict=True):
            if not any(group_ranks):
                self.groups.append(None)
                continue
            a = torch.empty(_SLOTS_PER_BLOCK, sum(group_ranks), group.in_features, dtype=dtype, device=device)
            members = []
            rank_offset = column_offset = 0
            for rank, out_features in zip(group_ranks, group.out_features, strict=True):
                if rank:
                    b = torch.empty(_SLOTS_PER_BLOCK, rank, out_features, dtype=dtype, device=device)
                    columns = slice(column_offset, column_offset + out_features)
                    members.append(MemberLora(slice(rank_offset, rank_offset + rank), columns, b))
                rank_offset += rank
                column_offset += out_features
            self.groups.append(GroupLora(a, members, _description(members)))


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
    tensors: list[tuple[torch.Tensor, list[torch.Tensor]] | None] = field(default_factory=list)
    """By linear group: A [sum of ranks, in] and the members' B [rank, out], scaled."""
    model: EngineModel | None = None
    """A whole tuned checkpoint, bound to a model of its own."""
    changes: Changes = field(default_factory=dict)
    """What it changes beside low-rank products, on the device already."""
    prefix: PrefixKV | None = None
    """Virtual tokens before each sequence, on the device already."""


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter on the device."""

    digest: str
    report: LoadReport
    block: SlotBlock | None
    slot: int
    model: EngineModel | None
    changes: Changes = field(default_factory=dict)
    prefix: PrefixKV | None = None
    leases: int = 0


class AdapterPool:
    """Loaded adapters by digest. Thread-safe: the loader places and evicts, the step loop leases and releases."""

    def __init__(self, budget_bytes: int, groups: list[LinearGroup], dtype: torch.dtype, device: torch.device) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._groups = groups
        self._dtype = dtype
        self._device = device
        self._copies = copies_to(device)
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # least recently used first
        self._blocks: dict[Ranks, list[SlotBlock]] = {}
        self._draining: set[str] = set()
        self._changed = threading.Condition()
        self.waits_for_room = False
        """A load waits for leases to end. Read without the lock: a stale answer is put right in the next step."""

    def digests(self) -> list[str]:
        """What is loaded now."""
        with self._changed:
            return list(self._loaded)

    def lease(self, digest: str) -> LoadedAdapter | None:
        """The adapter with one more lease, or None if it is not loaded or is being unloaded."""
        with self._changed:
            adapter = self._loaded.get(digest)
            if adapter is None or digest in self._draining:
                return None
            adapter.leases += 1
            self._loaded.move_to_end(digest)
            return adapter

    def release(self, adapter: LoadedAdapter) -> None:
        """Gives one lease back."""
        with self._changed:
            adapter.leases -= 1
            if adapter.leases == 0 and adapter.digest in self._draining:
                self._drop(adapter)
            self._changed.notify_all()

    def place(self, prepared: PreparedAdapter, started: float, stop: threading.Event) -> LoadedAdapter:
        """Copies an adapter into the pool and returns it with one lease.

        Evicts adapters nobody leases, least recently used first; waits for leases to end while there are not enough.
        `started` is time.perf_counter() at the request. Raises ResourceExhausted if it could not fit an empty pool.
        """
        if prepared.device_bytes > self.budget_bytes:
            raise ResourceExhausted(
                f"the adapter takes {prepared.device_bytes} bytes on the device, the pool has {self.budget_bytes}; "
                "start the server with a larger --adapter-memory-bytes",
                reason="ADAPTER_TOO_LARGE",
            )
        with self._changed:
            try:
                while prepared.digest in self._loaded or not self._make_room(prepared.device_bytes):
                    if stop.is_set():
                        raise ResourceExhausted("the server is shutting down", reason="SHUTTING_DOWN")
                    self.waits_for_room = True
                    self._changed.wait(timeout=0.1)
            finally:
                self.waits_for_room = False
            self.used_bytes += prepared.device_bytes
            block, slot = self._take_slot(prepared) if prepared.tensors else (None, 0)
        if block is not None:
            self._copies.copy(_pairs(block, slot, prepared))
        with self._changed:
            report = LoadReport(
                modules_bound=prepared.modules_bound,
                rank=prepared.rank,
                device_bytes=prepared.device_bytes,
                load_ms=(time.perf_counter() - started) * 1000,
            )
            adapter = LoadedAdapter(
                prepared.digest, report, block, slot, prepared.model, prepared.changes, prepared.prefix, leases=1
            )
            self._loaded[prepared.digest] = adapter
            return adapter

    def unload(self, digest: str) -> bool:
        """Unloads an adapter, at once or when its last lease ends; nobody gets a new lease from now on.

        False if it is not loaded.
        """
        with self._changed:
            adapter = self._loaded.get(digest)
            if adapter is None:
                return False
            if adapter.leases:
                self._draining.add(digest)
            else:
                self._drop(adapter)
            return True

    def report(self, digest: str) -> LoadReport | None:
        """What the load of `digest` bound; None if it is not loaded or is being unloaded."""
        with self._changed:
            adapter = self._loaded.get(digest)
            return adapter.report if adapter is not None and digest not in self._draining else None

    def _make_room(self, needed: int) -> bool:
        """Evicts until `needed` bytes are free; evicts nothing if that cannot be reached."""
        idle = [adapter for adapter in self._loaded.values() if adapter.leases == 0]
        available = self.budget_bytes - self.used_bytes
        if available + sum(adapter.report.device_bytes for adapter in idle) < needed:
            return False
        for adapter in idle:
            if self.budget_bytes - self.used_bytes >= needed:
                break
            self._drop(adapter)
        return True

    def _drop(self, adapter: LoadedAdapter) -> None:
        del self._loaded[adapter.digest]
        self._draining.discard(adapter.digest)
        self.used_bytes -= adapter.report.device_bytes
        if adapter.block is not None:
            adapter.block.free.append(adapter.slot)
            adapter.block.free.sort()
            for ranks, blocks in list(self._blocks.items()):
                kept = [block for block in blocks if len(block.free) < _SLOTS_PER_BLOCK]
                if kept:
                    self._blocks[ranks] = kept
                else:
                    del self._blocks[ranks]
        adapter.model = None
        adapter.changes = {}
        adapter.prefix = None
        self._changed.notify_all()

    def _take_slot(self, prepared: PreparedAdapter) -> tuple[SlotBlock, int]:
        blocks = self._blocks.setdefault(prepared.ranks, [])
        block = next((block for block in blocks if block.free), None)
        if block is None:
            block = SlotBlock(prepared.ranks, self._groups, self._dtype, self._device)
            blocks.append(block)
        return block, block.free.pop(0)


def _pairs(block: SlotBlock, slot: int, prepared: PreparedAdapter) -> Iterator[Pair]:
    """A and B of a slot that nobody else uses, each with what is written there."""
    for lora, tensors in zip(block.groups, prepared.tensors, strict=True):
        if lora is None or tensors is None:
            continue
        a, bs = tensors
        yield lora.a[slot], a
        for member, b in zip(lora.members, bs, strict=True):
            yield member.b[slot], b
