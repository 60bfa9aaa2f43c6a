"""The KV cache of CUDA: attention from its blocks against plain attention, and whether torch's varlen_attn is used.

Without a GPU the Triton kernels run in Triton's interpreter, and varlen_attn is played by a function of the test.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.server.kernels.triton_device import DEVICE, kernels_for

from graftwork_server.kernels.attention.packed import causal_attention
from graftwork_server.kernels.triton import triton_kernels
from graftwork_server.layers.attention import paged
from graftwork_server.layers.attention.block_kv_cache import BlockKVCache, kv_cache_for, torch_varlen, usable_varlen
from graftwork_server.layers.attention.kv_cache import KVCache, LayerShape, rows_of
from graftwork_server.layers.attention.paged import Chunk, plan_attention

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def check_step(
    cache: BlockKVCache,
    dtype: torch.dtype,
    heads: int,
    shape: LayerShape,
    window: int | None = None,
    softcap: float | None = None,
    prefill: int = 0,
) -> None:
    """One forward over three decoding sequences, and one that is computed in chunks if `prefill`."""
    lengths = [1 + 4, 1 + 16, 1 + 137]
    tables = [[7], [3, 9], [12, 0, 5, 1, 2, 4, 6, 8, 10]]
    counts = [1, 1, 1]
    if prefill:
        lengths, tables, counts = [*lengths, 20 + prefill], [*tables, [11, 13, 14]], [*counts, prefill]
    keys = [draw(shape.kv_heads, n, shape.key_dim, seed=n).to(dtype) for n in lengths]
    values = [draw(shape.kv_heads, n, shape.value_dim, seed=n + 50).to(dtype) for n in lengths]
    for table, key, value, n, count in zip(tables, keys, values, lengths, counts, strict=True):
        rows = torch.tensor(rows_of(table, 0, n - count), device=DEVICE)
        cache.write(1, rows, key[:, :-count], value[:, :-count])
    chunks = [Chunk(table, n - count, count) for table, n, count in zip(tables, lengths, counts, strict=True)]
    query = draw(heads, sum(counts), shape.key_dim, seed=99).to(dtype)
    module = torch.nn.Module()
    module.layer_idx = 1  # type: ignore[assignment]
    new_key, new_value = (
        torch.cat([t[:, -count:] for t, count in zip(tensors, counts, strict=True)], dim=1)[None]
        for tensors in (keys, values)
    )
    paged.set_plan(plan_attention(cache, chunks, DEVICE))
    try:
        answer, _ = paged.paged_attention(
            module, query[None], new_key, new_value, None, scaling=0.3, sliding_window=window, softcap=softcap
        )
    finally:
        paged.set_plan(None)
    row = 0
    exact = dtype == torch.float32
    for key, value, count in zip(keys, values, counts, strict=True):
        expected = causal_attention(
            query[:, row : row + count].float(),
            key.float(),
            value.float(),
            scaling=0.3,
            sliding_window=window,
            softcap=softcap,
        ).transpose(0, 1)
        tolerance = 2e-5 if exact else 2e-2
        torch.testing.assert_close(answer[0, row : row + count].float(), expected, atol=tolerance, rtol=tolerance)
        row += count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 8, 8), (6, 2, 16, 12), (5, 1, 24, 24), (40, 2, 20, 40)], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, 3.0)])
def test_decodes_from_blocks(
    dtype: torch.dtype, shape: tuple[int, int, int, int], window: int | None, softcap: float | None
) -> None:
    heads, *of_layer = shape
    layer = LayerShape(*of_layer)
    cache = BlockKVCache([layer] * 2, 16, dtype, DEVICE, kernels_for(dtype))
    check_step(cache, dtype, heads, layer, window, softcap)


@pytest.mark.parametrize("window", [None, 5])
def test_prefill_beside_decodes(window: int | None) -> None:
    layer = LayerShape(2, 16, 12)
    cache = BlockKVCache([layer] * 2, 16, torch.float32, DEVICE, kernels_for(torch.float32))
    check_step(cache, torch.float32, 6, layer, window, prefill=9)


def test_other_sequences_blocks_are_not_read() -> None:
    """What lies behind a sequence's end in its last block, or in blocks of others, is not even multiplied by zero."""
    layer = LayerShape(2, 16, 16)
    cache = BlockKVCache([layer] * 2, 16, torch.float32, DEVICE, kernels_for(torch.float32))
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    check_step(cache, torch.float32, 4, layer)


def test_clear_and_gather() -> None:
    layer = LayerShape(2, 8, 4)
    cache = BlockKVCache([layer], 3, torch.float32, DEVICE, kernels_for(torch.float32))
    rows = torch.tensor([5, 17, 40], device=DEVICE)
    key, value = draw(2, 3, 8), draw(2, 3, 4, seed=1)
    cache.write(0, rows, key, value)
    assert all(torch.equal(got, put) for got, put in zip(cache.gather(0, rows), (key, value), strict=True))
    cache.clear(rows[1:2])
    gathered, _ = cache.gather(0, rows)
    assert torch.equal(gathered[:, [0, 2]], key[:, [0, 2]])
    assert not gathered[:, 1].any()


def test_the_cpu_keeps_its_own_cache() -> None:
    assert triton_kernels(CPU, torch.float32, []) is None
    assert isinstance(kv_cache_for([LayerShape(1, 8, 8)], 1, torch.float32, CPU, None, None), KVCache)


# ---------------------------------------------------------------------------------------------- torch's varlen_attn


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """What torch's documentation says of varlen_attn, for one query of each sequence."""
    assert (max_q, enable_gqa) == (1, query.shape[1] != key.shape[2])
    assert max_k >= int(seqused_k.max())
    assert cu_seq_q.tolist() == list(range(len(query) + 1))
    output = torch.empty_like(query)
    for row, (table, length) in enumerate(zip(block_table.tolist(), seqused_k.tolist(), strict=True)):
        rows = rows_of(table, 0, length)
        k, v = (t.flatten(0, 1)[rows].transpose(0, 1) for t in (key, value))
        window = None if window_size == (-1, -1) else window_size[0] + 1
        attended = causal_attention(
            query[row, :, None], k, v, scaling=scale or 1.0, sliding_window=window, softcap=None
        )
        output[row] = attended[:, 0]
    return output


@functools.wraps(varlen)
def wrong(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> torch.Tensor:
    return varlen(*args, window_size=(-1, -1), **kwargs)


@functools.wraps(varlen)
def raising(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise RuntimeError("FlashAttention 2 reads no block tables")


def of_torch_2_11(query: Any, key: Any, value: Any, cu_seq_q: Any, *, scale: Any, window_size: Any) -> Any:
    raise AssertionError("must not be called: it takes no block table")


def test_varlen_attn_is_used_where_it_answers_right() -> None:
    shape = LayerShape(2, 16, 16)
    assert usable_varlen(varlen, shape, torch.bfloat16, DEVICE) is varlen
    assert usable_varlen(raising, shape, torch.bfloat16, DEVICE) is None
    assert usable_varlen(of_torch_2_11, shape, torch.bfloat16, DEVICE) is None
    assert usable_varlen(wrong, shape, torch.bfloat16, DEVICE) is None, "it forgets the window"
    assert usable_varlen(varlen, shape, torch.float32, DEVICE) is None, "FlashAttention takes no float32"
    assert usable_varlen(varlen, LayerShape(2, 16, 8), torch.bfloat16, DEVICE) is None
    assert usable_varlen(varlen, LayerShape(2, 12, 12), torch.bfloat16, DEVICE) is None


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU it may be usable")
def test_torchs_own_is_not_usable_on_a_cpu() -> None:
    assert usable_varlen(torch_varlen(), LayerShape(2, 16, 16), torch.bfloat16, DEVICE) is None


@pytest.mark.parametrize(("window", "softcap", "calls"), [(None, None, 1), (5, None, 1), (None, 3.0, 0)])
def test_soft_caps_are_left_to_the_kernels(window: int | None, softcap: float | None, calls: int) -> None:
    called = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        called.append(1)
        return varlen(*args, **kwargs)

    layer = LayerShape(2, 16, 16)
    cache = BlockKVCache([layer] * 2, 16, torch.bfloat16, DEVICE, kernels_for(torch.bfloat16), counted)
    check_step(cache, torch.bfloat16, 6, layer, window, softcap)
    check_step(cache, torch.bfloat16, 6, layer, window, softcap, prefill=9)
    assert len(called) == 2 * calls
