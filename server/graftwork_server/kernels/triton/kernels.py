"""Launches of the Triton kernels on torch tensors: tile sizes, grids and scratch memory.

The sizes are chosen by shape, not tuned: no kernel of this folder has run on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton

from graftwork_server.kernels.low_rank import LowRankBlock
from graftwork_server.kernels.native import KV_BLOCK_TOKENS as BLOCK_TOKENS
from graftwork_server.kernels.triton import attention, lora

SHORT_TILE, LONG_TILE = 16, 64
"""Rows of a tile: what a matrix unit takes at least, for decoding rows; and more of them where a span is longer."""
_GROUP_FIELDS, _MEMBER_FIELDS = lora.GROUP_FIELDS.value, lora.MEMBER_FIELDS.value


@dataclass(frozen=True)
class Tiles:
    """Tiles of one height over rows of one forward (lora.py)."""

    table: torch.Tensor
    """[tiles, 3] int64 on the device: first row, rows, address of the slot's table or 0"""
    rows: int
    """SHORT_TILE or LONG_TILE"""
    most_ranks: int
    """No group of these adapters has more ranks in all; a power of two of at least 16"""


Span = tuple[int, int, LowRankBlock, int]
"""Rows [start, end) of the adapter in that slot of that block."""


class TileProducts:
    """The low-rank products of one forward (routing.SpanProducts)."""

    def __init__(self, kernels: TritonKernels, tiles: Sequence[Tiles]) -> None:
        self._kernels = kernels
        self._tiles = tiles

    def add(self, group: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the deltas of linear group `group` to y [rows, out of all members] in place; x [rows, in]."""
        for tiles in self._tiles:
            self._kernels.lora(x, y, tiles, group)


class TritonKernels:
    """The kernels for one dtype, on one device."""

    def __init__(self, dtype: torch.dtype, out_features: Sequence[Sequence[int]], busy_programs: int = 256) -> None:
        """out_features: by linear group, of its members. busy_programs: how many keep the device busy; work is split
        until there are about as many."""
        self._busy_programs = busy_programs
        self.dtype = dtype
        self._out_features = out_features
        # The interpreter's dot takes bfloat16 for integers; on a GPU its products are exact in float32 anyway.
        self._upcast = dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
        self._tables: WeakKeyDictionary[LowRankBlock, torch.Tensor] = WeakKeyDictionary()

    def address(self, block: LowRankBlock, slot: int) -> int:
        """The device address of a slot's table; it stays the same as long as the block lives."""
        table = self._tables.get(block)
        if table is None:
            table = self._tables[block] = slot_tables(block)
        return table.data_ptr() + slot * table.stride(0) * table.element_size()

    def products(self, spans: Sequence[Span], device: torch.device) -> TileProducts | None:
        """The products of all `spans`, short ones and long ones each in one launch; None if there are no spans."""
        tiles = self.tiles(spans, device)
        return TileProducts(self, tiles) if tiles else None

    def tiles(self, spans: Sequence[Span], device: torch.device) -> list[Tiles]:
        """Tiles for `spans`, by height."""
        found = []
        for height, chosen in (
            (SHORT_TILE, [span for span in spans if span[1] - span[0] <= SHORT_TILE]),
            (LONG_TILE, [span for span in spans if span[1] - span[0] > SHORT_TILE]),
        ):
            if chosen:
                rows = [
                    [first, min(height, end - first), self.address(block, slot)]
                    for start, end, block, slot in chosen
                    for first in range(start, end, height)
                ]
                most = most_ranks(max(block.most_ranks for _, _, block, _ in chosen))
                found.append(Tiles(torch.tensor(rows, dtype=torch.int64, device=device), height, most))
        return found

    def decode_tiles(
        self, slots: Sequence[tuple[LowRankBlock | None, int] | None]
    ) -> tuple[list[tuple[int, int, int]], int]:
        """Tiles for rows whose adapters lie in `slots`, None for rows of the base: first row, rows, address of the
        slot's table. And their most_ranks, 0 if there are no tiles."""
        tiles: list[tuple[int, int, int]] = []
        most = 0
        for row, slot in enumerate(slots):
            if slot is None or slot[0] is None:
                continue
            address = self.address(slot[0], slot[1])
            most = max(most, most_ranks(slot[0].most_ranks))
            first, rows, of_last = tiles[-1] if tiles else (0, 0, 0)
            if of_last == address and first + rows == row and rows < SHORT_TILE:
                tiles[-1] = (first, rows + 1, address)
            else:
                tiles.append((row, 1, address))
        return tiles, most

    def static_products(self, tiles: torch.Tensor, most_ranks: int) -> TileProducts:
        """The products of tiles [n, 3] that decode_tiles made, read from the device when they are computed."""
        return TileProducts(self, [Tiles(tiles, SHORT_TILE, most_ranks)])

    def lora(self, x: torch.Tensor, y: torch.Tensor, tiles: Tiles, group: int) -> None:
        """Adds the deltas of linear group `group` to y [rows, out of all members] in place; x [rows, in_features].

        Both are dense in their last dimension."""
        count, width = len(tiles.table), tiles.most_ranks
        in_features = x.shape[1]
        ranks = min(width, 64)
        features = 64 if x.dtype == torch.float32 else 128
        splits = 1
        if tiles.rows == SHORT_TILE:
            splits = self._splits(count * (width // ranks), triton.cdiv(in_features, features))
        split_features = triton.cdiv(triton.cdiv(in_features, splits), features) * features
        hidden = torch.empty(splits, len(x), width, dtype=torch.float32, device=x.device)
        lora.shrink[(count, width // ranks, splits)](
            x,
            hidden,
            tiles.table,
            group,
            in_features,
            x.stride(0),
            len(x),
            width,
            split_features,
            ROWS=tiles.rows,
            RANKS=ranks,
            FEATURES=features,
            UPCAST=self._upcast,
        )
        out_features, columns = self._out_features[group], 64
        lora.expand[(count, len(out_features), triton.cdiv(max(out_features), columns))](
            y,
            hidden,
            tiles.table,
            group,
            y.stride(0),
            len(x),
            width,
            splits,
            ROWS=tiles.rows,
            RANKS=min(ranks, 32),
            COLUMNS=columns,
            UPCAST=self._upcast,
        )

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of the decoding rows of query [tokens, heads, key_dim] -> [sequences, heads, value_dim].

        keys and values [blocks, BLOCK_TOKENS, kv_heads, dim], dense, the new tokens' written already. rows int64
        [sequences], tables int32 [sequences, blocks], lengths int32 [sequences], at least 1."""
        count, heads, (kv_heads, key_dim), value_dim = len(rows), query.shape[1], keys.shape[2:], values.shape[3]
        query = query if query.stride(-1) == 1 else query.contiguous()
        # By the batch alone, not by lengths: a captured graph is replayed for any.
        splits = self._splits(count * kv_heads, 16)
        parts = torch.empty(count, heads, splits, value_dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(count, heads, splits, 2, dtype=torch.float32, device=query.device)
        output = query.new_empty(count, heads, value_dim)
        groups = heads // kv_heads
        attention.attend[(count, kv_heads, splits)](
            query,
            keys,
            values,
            rows,
            tables,
            lengths,
            parts,
            sums,
            scale,
            window or 0,
            softcap or 0.0,
            query.stride(0),
            query.stride(1),
            tables.stride(0),
            kv_heads,
            key_dim,
            value_dim,
            groups,
            GROUPS=max(16, triton.next_power_of_2(groups)),
            KEY_DIM=max(16, triton.next_power_of_2(key_dim)),
            VALUE_DIM=max(16, triton.next_power_of_2(value_dim)),
            BLOCK_TOKENS=BLOCK_TOKENS,
            TOKENS=64 if max(key_dim, value_dim) <= 128 else 32,
            SPLITS=splits,
            CAPPED=softcap is not None,
            UPCAST=self._upcast,
        )
        attention.combine[(count * heads,)](
            output, parts, sums, value_dim, VALUE_DIM=max(16, triton.next_power_of_2(value_dim)), SPLITS=splits
        )
        return output

    def _splits(self, programs: int, most: int) -> int:
        """Into how many parts each program's work is cut, a power of two of at most 16 and `most`."""
        splits = 1
        while splits < 16 and splits * 2 <= most and programs * splits < self._busy_programs:
            splits *= 2
        return splits


def slot_tables(block: LowRankBlock) -> torch.Tensor:
    """[slots, groups, 17] int64, on the block's device: what the kernels need of each slot (lora.GROUP_FIELDS).

    A and B of a slot never move, so the tables are made once for a block, whatever comes into its slots."""
    slots = max(len(lora_of_group.a) for lora_of_group in block.groups if lora_of_group is not None)
    table = torch.zeros(slots, len(block.groups), _GROUP_FIELDS, dtype=torch.int64)
    slot = torch.arange(slots)
    device = None
    for index, group in enumerate(block.groups):
        if group is None:
            continue
        device = group.a.device
        table[:, index, 0] = group.a.data_ptr() + slot * group.a.stride(0) * group.a.element_size()
        table[:, index, 1] = group.a.shape[1]
        # Members without a delta of their own are left out of the list; the kernels go by first column, not by place.
        for place, member in enumerate(group.members):
            fields = table[:, index, 2 + place * _MEMBER_FIELDS : 2 + (place + 1) * _MEMBER_FIELDS]
            fields[:, 0] = member.b.data_ptr() + slot * member.b.stride(0) * member.b.element_size()
            fields[:, 1] = member.ranks.start
            fields[:, 2] = member.ranks.stop - member.ranks.start
            fields[:, 3] = member.columns.start
            fields[:, 4] = member.b.shape[2]
    return table.to(device)


def most_ranks(ranks: int) -> int:
    """`ranks` rounded up to a power of two of at least 16: few different launches, and few captured graphs."""
    return max(16, triton.next_power_of_2(ranks))
