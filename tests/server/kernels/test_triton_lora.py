"""The Triton kernels for low-rank updates against torch. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch
from tests.server.kernels.triton_device import DEVICE, kernels_for

from graftwork_server.layers.slots import SlotBlock

if TYPE_CHECKING:
    from graftwork_server.layers.linear import LinearGroup

DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Shape:
    """Of a LinearGroup, what a SlotBlock reads."""

    in_features: int
    out_features: list[int] = field(default_factory=list)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_block(ranks: tuple[tuple[int, ...], ...], shapes: list[Shape], dtype: torch.dtype, seed: int) -> SlotBlock:
    groups: list[LinearGroup] = shapes  # type: ignore[assignment]
    block = SlotBlock(ranks, groups, dtype, DEVICE)
    for index, lora in enumerate(block.groups):
        if lora is not None:
            lora.a.copy_(draw(*lora.a.shape, seed=seed + index) / lora.a.shape[2] ** 0.5)
            for place, member in enumerate(lora.members):
                member.b.copy_(draw(*member.b.shape, seed=seed + 10 * place + 100))
    return block


Span = tuple[int, int, SlotBlock, int]


def expected(x: torch.Tensor, y: torch.Tensor, spans: list[Span], group: int) -> torch.Tensor:
    """In float64, from the same slots."""
    result = y.double().clone()
    for start, end, block, slot in spans:
        lora = block.groups[group]
        if lora is None:
            continue
        hidden = x[start:end].double() @ lora.a[slot].double().T
        for member in lora.members:
            result[start:end, member.columns] += hidden[:, member.ranks] @ member.b[slot].double()
    return result


def check(dtype: torch.dtype, shapes: list[Shape], spans: list[Span], rows: int) -> None:
    kernels = kernels_for(dtype, [shape.out_features for shape in shapes])
    products = kernels.products(spans, DEVICE)
    assert products is not None
    for group, shape in enumerate(shapes):
        x = draw(rows, shape.in_features, seed=7).to(DEVICE, dtype)
        y = draw(rows, sum(shape.out_features), seed=8).to(DEVICE, dtype)
        wanted = expected(x, y, spans, group)
        products.add(group, x, y)
        exact = dtype == torch.float32
        tolerance = 1e-4 if exact else 3e-2 * float(wanted.abs().max())
        torch.testing.assert_close(y.double(), wanted, atol=tolerance, rtol=1e-5 if exact else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 130, 512])
def test_every_rank(rank: int, dtype: torch.dtype) -> None:
    shapes = [Shape(40, [24])]
    block = make_block(((rank,),), shapes, dtype, seed=rank)
    check(dtype, shapes, [(1, 2, block, 3), (2, 4, block, 0)], rows=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_different_ranks_in_one_launch(dtype: torch.dtype) -> None:
    """Fused members, some without a delta; sizes that no tile divides; rows of the base between."""
    shapes = [Shape(200, [70, 33, 5]), Shape(47, [12])]
    blocks = [
        make_block(ranks, shapes, dtype, seed=seed)
        for seed, ranks in enumerate([((8, 8, 8), (8,)), ((1, 0, 20), (0,)), ((0, 0, 0), (64,))])
    ]
    spans = [(0, 1, blocks[0], 2), (2, 3, blocks[1], 0), (3, 5, blocks[2], 15), (5, 6, blocks[0], 0)]
    kernels = kernels_for(dtype)
    assert len(kernels.tiles(spans, DEVICE)) == 1
    check(dtype, shapes, spans, rows=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_spans_beside_short_ones(dtype: torch.dtype) -> None:
    shapes = [Shape(72, [66, 20])]
    block, other = (make_block(ranks, shapes, dtype, seed=5) for ranks in (((4, 16),), ((33, 2),)))
    spans = [(0, 16, block, 1), (16, 33, other, 4), (40, 111, block, 0)]
    tiles = kernels_for(dtype).tiles(spans, DEVICE)
    assert [(part.rows, len(part.table)) for part in tiles] == [(16, 1), (64, 3)]
    check(dtype, shapes, spans, rows=112)


def test_no_spans_and_tiles_of_the_base() -> None:
    kernels = kernels_for(torch.float32, [[10]])
    assert kernels.products([], DEVICE) is None
    shapes = [Shape(20, [10])]
    block = make_block(((4,),), shapes, torch.float32, seed=1)
    (tiles,) = kernels.tiles([(0, 1, block, 0)], DEVICE)
    tiles.table.zero_()  # as the rows that fill up a captured batch are
    y = draw(2, 10, seed=1).to(DEVICE)
    before = y.clone()
    kernels.lora(draw(2, 20, seed=2).to(DEVICE), y, tiles, 0)
    assert torch.equal(y, before)


def test_rows_that_are_not_side_by_side() -> None:
    """x and y may be views of wider tensors."""
    shapes = [Shape(20, [10])]
    block = make_block(((4,),), shapes, torch.float32, seed=1)
    spans: list[Span] = [(0, 3, block, 5)]
    x, y = draw(3, 30, seed=1).to(DEVICE)[:, 5:25], draw(3, 14, seed=2).to(DEVICE)
    wanted = expected(x, y[:, 2:12], spans, 0)
    kernels = kernels_for(torch.float32, [[10]])
    kernels.lora(x, y[:, 2:12], kernels.tiles(spans, DEVICE)[0], 0)
    torch.testing.assert_close(y[:, 2:12].double(), wanted, atol=1e-5, rtol=1e-5)


def test_tables_go_with_their_block() -> None:
    kernels = kernels_for(torch.float32)
    shapes = [Shape(20, [10])]
    block = make_block(((4,),), shapes, torch.float32, seed=1)
    first = kernels.address(block, 0)
    assert kernels.address(block, 1) - first == 17 * 8
    assert kernels.address(block, 0) == first
    del block
    assert not kernels._tables
