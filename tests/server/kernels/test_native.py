"""The CPU kernels against torch, on random input."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from graftwork_server.kernels.attention.packed import causal_attention
from graftwork_server.kernels.native import NativeKernels, build, native_kernels
from graftwork_server.kernels.native.build import load_library
from graftwork_server.kernels.native.kernels import LINEAR_ROWS
from graftwork_server.layers.attention import kv_cache, paged
from graftwork_server.layers.attention.kv_cache import KVCache, LayerShape, rows_of
from graftwork_server.layers.attention.paged import Chunk, plan_attention

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    found = native_kernels(CPU, request.param)
    if found is None:
        pytest.skip("no C compiler")
    return found


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(answer: torch.Tensor, expected: torch.Tensor) -> bool:
    """bfloat16 results are rounded once, to 8 bits."""
    exact = answer.dtype == torch.float32
    return torch.allclose(answer.float(), expected, rtol=2e-5 if exact else 1e-2, atol=2e-5 if exact else 1e-2)


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 8), (47, 12), (576, 20), (31, 4), (96, 64), (50, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(in_features: int, out_features: int, with_bias: bool) -> None:
    kernels = native_kernels(CPU, torch.bfloat16)
    if kernels is None or kernels.layers is None:
        pytest.skip("no C compiler" if kernels is None else "this processor multiplies no bfloat16")
    weight, bias = draw(out_features, in_features, seed=1).bfloat16(), draw(out_features, seed=2).bfloat16()
    for rows in (1, 2, 3, 4, 7, 16, 32, 33, 70):
        x = draw(1, rows, in_features).bfloat16()
        if not kernels.has_linear(x, out_features):
            assert rows > LINEAR_ROWS, "in vectors, every number of rows up to there is taken"
            continue
        expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float() if with_bias else None)
        answer = kernels.linear(x, weight, bias if with_bias else None)
        assert answer.shape == expected.shape
        assert torch.allclose(answer.float(), expected, rtol=1e-2, atol=2e-2)


def test_transpose(kernels: NativeKernels) -> None:
    shapes = [(70, 3), (1, 65), (129, 16), (5, 1), (64, 64)]
    sources = [draw(*shape, seed=seed).to(kernels.dtype) for seed, shape in enumerate(shapes)]
    scales = [1.5, 1.0, 0.3, 1.0, -2.0]
    targets = [torch.empty(source.shape[::-1], dtype=kernels.dtype) for source in sources]
    assert kernels.transpose(sources, targets, scales) == [True] * len(shapes)
    for source, target, scale in zip(sources, targets, scales, strict=True):
        assert torch.equal(target, (source.float() * scale).to(kernels.dtype).t())
    sources[1][0, 64], sources[2][128, 15], sources[3][0, 0] = float("nan"), float("inf"), float("-inf")
    assert kernels.transpose(sources, targets, scales) == [True, False, False, False, True]
    assert kernels.transpose([torch.full((2, 2), 3e38).to(kernels.dtype)], [targets[4]], [2.0]) == [False]


def test_linear_leaves_what_it_cannot_do_to_torch() -> None:
    kernels = native_kernels(CPU, torch.bfloat16)
    if kernels is None:
        pytest.skip("no C compiler")
    assert not kernels.has_linear(torch.zeros(1, 33, 8, dtype=torch.bfloat16), 8)  # no whole panel of outputs
    assert not kernels.has_linear(torch.zeros(1, 1, 8, dtype=torch.bfloat16), 6)
    assert not kernels.has_linear(torch.zeros(1, 0, 8, dtype=torch.bfloat16), 8)


@pytest.mark.parametrize("ranks", [(3, 0), (8, 8), (1, 17), (0, 64)])
@pytest.mark.parametrize("columns", [(70, 5), (64, 600)])
def test_lora_adds_each_span_its_own_deltas(
    kernels: NativeKernels, ranks: tuple[int, int], columns: tuple[int, int]
) -> None:
    in_features, slots = 40, 4
    spans = [(1, 1, 2), (3, 2, 0), (5, 1, 3), (9, 4, 2)]  # first row, rows, slot; the rows between are the base's
    # What belongs to one slot lies together.
    shapes = [(sum(ranks), in_features), *zip(ranks, columns, strict=True)]
    memory = draw(slots, sum(first * second for first, second in shapes)).to(kernels.dtype)
    parts = memory.split([first * second for first, second in shapes], dim=1)
    a, *bs = (part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))
    x = draw(13, in_features, seed=1).to(kernels.dtype)
    y = draw(13, sum(columns), seed=2).to(kernels.dtype)
    expected = y.float()
    for first, rows, slot in spans:
        hidden = x[first : first + rows].float() @ a[slot].float().T
        of_members = hidden.split(list(ranks), dim=1)
        deltas = [part @ b[slot].float() for part, b in zip(of_members, bs, strict=True)]
        expected[first : first + rows] += torch.cat(deltas, dim=1)
    table, hidden_row = [], 0
    for first, rows, slot in spans:
        table.append([first, rows, slot, hidden_row])
        hidden_row += rows
    members, rank_first, column_first = [], 0, 0
    for rank, width, b in zip(ranks, columns, bs, strict=True):
        if rank:
            members.append([b.data_ptr(), rank_first, rank, column_first, width])
        rank_first, column_first = rank_first + rank, column_first + width
    hidden = torch.empty(hidden_row * sum(ranks))
    kernels.lora(x, y, torch.tensor(table), a, torch.tensor(members), hidden)
    assert close(y, expected)


@pytest.mark.parametrize(("heads", "kv_heads", "key_dim", "value_dim"), [(4, 4, 8, 8), (6, 2, 16, 12), (5, 1, 24, 24)])
@pytest.mark.parametrize("window", [None, 5, 20])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attend_reads_every_sequence_through_its_own_table(
    kernels: NativeKernels,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    window: int | None,
    softcap: float | None,
) -> None:
    cache = KVCache([LayerShape(kv_heads, key_dim, value_dim)] * 2, 16, kernels.dtype, CPU, kernels)
    lengths = (1 + 4, 1 + 16, 1 + 37)  # tokens cached before and the one that decodes
    tables: list[list[int]] = [[7], [3, 9], [12, 0, 5]]
    keys = [draw(kv_heads, n, key_dim, seed=n).to(kernels.dtype) for n in lengths]
    values = [draw(kv_heads, n, value_dim, seed=n + 50).to(kernels.dtype) for n in lengths]
    for table, key, value, n in zip(tables, keys, values, lengths, strict=True):
        cache.write(1, torch.tensor(rows_of(table, 0, n - 1)), key[:, :-1], value[:, :-1])
    chunks = [Chunk(table, n - 1, 1) for table, n in zip(tables, lengths, strict=True)]
    query = draw(heads, 3, key_dim, seed=99).to(kernels.dtype)
    module = torch.nn.Module()
    module.layer_idx = 1  # type: ignore[assignment]
    new_key, new_value = (torch.stack([t[:, -1] for t in tensors], dim=1)[None] for tensors in (keys, values))
    paged.set_plan(plan_attention(cache, chunks, CPU))
    try:
        answer, _ = paged.paged_attention(
            module, query[None], new_key, new_value, None, scaling=0.3, sliding_window=window, softcap=softcap
        )
    finally:
        paged.set_plan(None)
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        expected = causal_attention(
            query[:, row : row + 1].float(),
            key.float(),
            value.float(),
            scaling=0.3,
            sliding_window=window,
            softcap=softcap,
        )
        assert close(answer[0, row], expected[:, 0]), row
    assert torch.equal(cache.keys[1][:, rows_of(tables[2], 37, 38)[0]], keys[2][:, -1])


def test_norm_and_gate(kernels: NativeKernels) -> None:
    x, weight = draw(3, 5, 70).to(kernels.dtype), draw(70, seed=1)
    expected = torch.nn.functional.rms_norm(x.float(), (70,), weight, 1e-6)
    assert close(kernels.rms_norm(x, weight, 1e-6), expected)
    strided = x.transpose(0, 1)
    assert close(kernels.rms_norm(strided, weight, 1e-6), expected.transpose(0, 1))
    gate, up = x.float().split(35, dim=-1)
    assert close(kernels.silu_mul(x), torch.nn.functional.silu(gate) * up)


def test_values_that_are_not_finite_stay_so(kernels: NativeKernels) -> None:
    x = torch.full((1, 70), float("nan"), dtype=kernels.dtype)
    assert kernels.rms_norm(x, torch.ones(70), 1e-6).isnan().all()
    assert kernels.silu_mul(x).isnan().all()
    huge = torch.full((1, 70), float("inf"), dtype=kernels.dtype)
    assert not kernels.rms_norm(huge, torch.ones(70), 1e-6).isfinite().any()


def test_a_compiler_that_fails_leaves_the_work_to_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such flag >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(broken))
    assert load_library() is None
    assert "no such flag" in caplog.text
    monkeypatch.setenv("CC", str(tmp_path / "missing"))
    assert load_library() is None
    assert "no C compiler" in caplog.text


def test_the_kernels_are_compiled_for_the_block_of_the_cache(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = Path(build.__file__).with_name("kernels.c")
    assert f"-DBLOCK={kv_cache.BLOCK_TOKENS}" in build._FLAGS
    command = [compiler, "-std=gnu11", "-fopenmp", "-fsyntax-only", str(source)]
    unsaid = subprocess.run(command, capture_output=True, text=True, check=False)
    assert unsaid.returncode != 0
    assert "given by build.py" in unsaid.stderr
    assert subprocess.run([*command, "-DBLOCK=32"], check=False).returncode == 0  # none of these lanes without AVX-512


def test_a_folder_that_others_can_write_to_is_not_run_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "graftwork").mkdir()
    (tmp_path / "graftwork").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_library() is None
    assert "written by others" in caplog.text
    assert subprocess.run(["ls", tmp_path / "graftwork"], capture_output=True, check=True).stdout == b""
