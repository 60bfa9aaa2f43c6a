"""The Triton kernels on a GPU, at the sizes of real models. Small sizes: test_triton_lora.py and test_block_cache.py of
tests/server/kernels and tests/server/layers, which run on a GPU too where there is one."""

from __future__ import annotations

import pytest
import torch
from tests.server.kernels.test_triton_lora import Shape, Span, check, make_block
from tests.server.kernels.triton_device import DEVICE, kernels_for
from tests.server.layers.test_block_cache import check_step

from graftwork_server.layers.attention.block_kv_cache import BlockKVCache, torch_varlen, usable_varlen
from graftwork_server.layers.attention.kv_cache import LayerShape

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [[8, 16, 64], [1, 3, 512]], ids=str)
def test_low_rank_updates(dtype: torch.dtype, ranks: list[int]) -> None:
    """64 decoding rows of three families and a prompt, on fused q/k/v of a model with 4,096 hidden units."""
    shapes = [Shape(4096, [4096, 1024, 1024]), Shape(14336, [4096])]
    blocks = [make_block(((rank, rank, rank), (rank,)), shapes, dtype, seed=rank) for rank in ranks]
    spans: list[Span] = [(row, row + 1, blocks[row % 3], row % 16) for row in range(64) if row % 4]
    check(dtype, shapes, [*spans, (64, 300, blocks[0], 7)], rows=300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (16, 16, 256)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 30.0)])
def test_attention_from_blocks(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None
) -> None:
    shape = LayerShape(kv_heads, dim, dim)
    cache = BlockKVCache([shape] * 2, 16, dtype, DEVICE, kernels_for(dtype))
    check_step(cache, dtype, heads, shape, window, softcap)
    check_step(cache, dtype, heads, shape, window, softcap, prefill=9)


@pytest.mark.parametrize("window", [None, 40])
def test_torchs_varlen_attn(window: int | None) -> None:
    shape = LayerShape(8, 128, 128)
    varlen = usable_varlen(torch_varlen(), shape, torch.bfloat16, DEVICE)
    if varlen is None:
        pytest.skip("this torch, or its FlashAttention on this GPU, reads no block tables")
    cache = BlockKVCache([shape] * 2, 16, torch.bfloat16, DEVICE, kernels_for(torch.bfloat16), varlen)
    check_step(cache, torch.bfloat16, 32, shape, window)
