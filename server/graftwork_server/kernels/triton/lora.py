"""Low-rank updates over tiles of rows: y += (x A^T) B, each tile with the A and B of its own slot (Punica's SGMV,
arXiv:2310.18547, with true ranks).

A tile is up to ROWS neighbouring rows of one adapter. It names its slot by the address of the slot's table, so that one
launch serves slots of any blocks and ranks, and a captured CUDA graph any mix of them. Address 0: the base, no work.
"""

import triton
import triton.language as tl

TILE_FIELDS = tl.constexpr(3)
"""int64 of a tile: first row, rows, address of its slot's table."""
MEMBER_FIELDS = tl.constexpr(5)
"""int64 of a member in a slot's table: address of b [rank, columns], first rank, rank, first column, columns."""
GROUP_FIELDS = tl.constexpr(2 + 5 * 3)
"""int64 of a linear group in a slot's table: address of a [ranks, in_features], ranks, and three members."""


@triton.jit
def shrink(
    x,  # [rows, in_features]
    hidden,  # [splits, rows, width] float32
    tiles,  # [tiles, TILE_FIELDS] int64
    group,
    in_features,
    x_stride,
    hidden_rows,
    width,
    split_features,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    FEATURES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """hidden[split] = x A^T over the split's part of the input features. Grid: tiles, parts of the ranks, splits."""
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    table = tl.load(tile + 2)
    if table == 0:
        return
    entry = table.to(tl.pointer_type(tl.int64)) + group * GROUP_FIELDS
    ranks = tl.load(entry + 1)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS >= ranks:
        return
    a = tl.load(entry).to(tl.pointer_type(x.dtype.element_ty))
    row = tl.load(tile) + tl.arange(0, ROWS)
    is_row = tl.arange(0, ROWS) < tl.load(tile + 1)
    split = tl.program_id(2)
    end = tl.minimum((split + 1) * split_features, in_features)
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for first in range(split * split_features, end, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        is_feature = feature < end
        x_part = tl.load(
            x + row[:, None] * x_stride + feature[None, :], mask=is_row[:, None] & is_feature[None, :], other=0.0
        )
        a_part = tl.load(  # [features, ranks]
            a + rank[None, :] * in_features + feature[:, None],
            mask=(rank < ranks)[None, :] & is_feature[:, None],
            other=0.0,
        )
        if UPCAST:
            x_part, a_part = x_part.to(tl.float32), a_part.to(tl.float32)
        total += tl.dot(x_part, a_part, input_precision="ieee")
    place = hidden + (split * hidden_rows + row)[:, None] * width + rank[None, :]
    tl.store(place, total, mask=is_row[:, None] & (rank < ranks)[None, :])


@triton.jit
def expand(
    y,  # [rows, columns of all members]
    hidden,  # [splits, rows, width] float32
    tiles,  # [tiles, TILE_FIELDS] int64
    group,
    y_stride,
    hidden_rows,
    width,
    splits,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y += (sum of hidden over the splits) B. Grid: tiles, members, parts of the widest member's columns.

    Each element of y belongs to one program, so the sum is the same in every run."""
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    table = tl.load(tile + 2)
    if table == 0:
        return
    entry = table.to(tl.pointer_type(tl.int64)) + group * GROUP_FIELDS + 2 + tl.program_id(1) * MEMBER_FIELDS
    ranks, columns = tl.load(entry + 2), tl.load(entry + 4)
    first_column = tl.program_id(2) * COLUMNS
    if (ranks == 0) | (first_column >= columns):
        return
    b = tl.load(entry).to(tl.pointer_type(y.dtype.element_ty))
    first_rank = tl.load(entry + 1)
    row = tl.load(tile) + tl.arange(0, ROWS)
    is_row = tl.arange(0, ROWS) < tl.load(tile + 1)
    column = first_column + tl.arange(0, COLUMNS)
    is_column = column < columns
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, ranks, RANKS):
        rank = first + tl.arange(0, RANKS)
        is_hidden = is_row[:, None] & (rank < ranks)[None, :]
        shrunk = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for split in range(0, splits):
            place = hidden + (split * hidden_rows + row)[:, None] * width + (first_rank + rank)[None, :]
            shrunk += tl.load(place, mask=is_hidden, other=0.0)
        b_part = tl.load(
            b + rank[:, None] * columns + column[None, :], mask=(rank < ranks)[:, None] & is_column[None, :], other=0.0
        )
        if UPCAST:
            b_part = b_part.to(tl.float32)
        total += tl.dot(shrunk.to(b_part.dtype), b_part, input_precision="ieee")
    place = y + row[:, None] * y_stride + (tl.load(entry + 3) + column)[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(place, (tl.load(place, mask=mask, other=0.0).to(tl.float32) + total).to(y.dtype.element_ty), mask=mask)
