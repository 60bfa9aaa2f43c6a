"""The kernels for quantised weights against torch's products, on every shape of their blocks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tests import toys
from tests.server.base.quantization_harness import assert_within_bounds, reference_logits
from tests.server.engine.harness import CPU, Harness
from transformers import LlamaConfig, LlamaForCausalLM

from graftwork_server.base.quantization import Int8Linear, Nf4Linear
from graftwork_server.kernels.native import NativeKernels, native_kernels
from graftwork_server.layers.models.causal import load_base


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    found = native_kernels(CPU, request.param)
    if found is None or not found.quantized.takes_int8(64, 16):
        pytest.skip("no C compiler" if found is None else "this processor has no AMX")
    return found


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS = (1, 2, 15, 16, 17, 32, 33, 48, 70)


def int8_case(sizes: tuple[int, int], rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[Int8Linear]]:
    """Rows of very different sizes, one of them zero; a layer without a bias and one with."""
    x = draw(rows, sizes[0]).to(dtype) * torch.logspace(-2, 2, rows)[:, None].to(dtype)
    x[rows // 2] = 0
    codes = Int8Linear.quantize(draw(*sizes[::-1], seed=2))
    return x, [Int8Linear(sizes, codes, bias) for bias in (None, draw(sizes[1], seed=1).to(dtype))]


@torch.inference_mode()
@pytest.mark.parametrize("sizes", [(64, 16), (128, 48), (192, 64), (320, 144)])
@pytest.mark.parametrize("threads", [1, 3])
def test_it_answers_what_torch_answers(kernels: NativeKernels, sizes: tuple[int, int], threads: int) -> None:
    kernels.quantized._threads = threads
    for rows in ROWS:
        x, layers = int8_case(sizes, rows, kernels.dtype)
        for layer in layers:
            # The sums are whole numbers, so that only the last float operations can differ.
            rounding = {"rtol": 1e-6, "atol": 1e-6} if kernels.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
            torch.testing.assert_close(layer.product(x, kernels), layer.product(x), **rounding)


@torch.inference_mode()
@pytest.mark.parametrize("sizes", [(64, 16), (320, 144)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_answers_the_same_whatever_is_beside_it(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """With this machine's kernels, whichever they are."""
    kernels = native_kernels(CPU, dtype)
    for rows in ROWS:
        x, layers = int8_case(sizes, rows, dtype)
        for layer in layers:
            alone = torch.cat([layer.product(row[None], kernels) for row in x])
            assert torch.equal(alone, layer.product(x, kernels)), rows


@torch.inference_mode()
def test_it_says_which_sizes_it_takes(kernels: NativeKernels) -> None:
    assert not kernels.quantized.takes_int8(96, 16)
    assert not kernels.quantized.takes_int8(64, 40)
    assert kernels.quantized.takes_nf4(64, 16, 3) == (kernels.dtype == torch.bfloat16)
    assert not kernels.quantized.takes_nf4(64, 16, 65)
    layer = Int8Linear((96, 40), Int8Linear.quantize(draw(40, 96)), None)
    x = draw(3, 96).to(kernels.dtype)
    assert torch.equal(layer.product(x, kernels), layer.product(x))
    assert layer.product(x[:0], kernels).shape == (0, 40)


@torch.inference_mode()
def test_what_is_not_finite_stays_so_in_its_row_alone(kernels: NativeKernels) -> None:
    layer = Int8Linear((64, 16), Int8Linear.quantize(draw(16, 64)), None)
    x = draw(4, 64).to(kernels.dtype)
    x[1, 5], x[2, 63] = float("nan"), float("-inf")
    finite = layer.product(x, kernels).isfinite()
    assert finite.all(1).tolist() == finite.any(1).tolist() == [True, False, False, True]


@torch.inference_mode()
def test_torch_s_own_tile_products_are_not_disturbed(kernels: NativeKernels) -> None:
    layer = Int8Linear((128, 64), Int8Linear.quantize(draw(64, 128)), None)
    x, weight = draw(64, 128).bfloat16(), draw(96, 128, seed=1).bfloat16()
    before = torch.nn.functional.linear(x, weight)
    for _ in range(3):
        layer.product(x.to(kernels.dtype), kernels)
        assert torch.equal(torch.nn.functional.linear(x, weight), before)


@torch.inference_mode()
@pytest.mark.parametrize("sizes", [(64, 16), (128, 48), (192, 64), (320, 144)])
@pytest.mark.parametrize("threads", [1, 3])
def test_nf4_is_as_near_as_bfloat16_weights_are(sizes: tuple[int, int], threads: int) -> None:
    kernels = native_kernels(CPU, torch.bfloat16)
    if kernels is None or not kernels.quantized.takes_nf4(*sizes, 1):
        pytest.skip("no C compiler" if kernels is None else "this processor has no AMX")
    kernels.quantized._threads = threads
    for rows, biased in itertools.product((1, 2, 15, 16, 17, 33, 64), (False, True)):
        x, bias = draw(rows, sizes[0]).bfloat16(), draw(sizes[1], seed=1).bfloat16() if biased else None
        layer = Nf4Linear(sizes, Nf4Linear.quantize(draw(*sizes[::-1], seed=2)), bias)
        exact = torch.nn.functional.linear(
            x.float(), layer.dequantized(torch.float32), None if bias is None else bias.float()
        )
        answer = layer.product(x, kernels)
        errors = [(y.float() - exact).square().mean().sqrt() for y in (answer, layer.product(x))]
        assert errors[0] < 2 * errors[1]  # of 16 values in the smallest case
        assert (answer.float() - exact).abs().max() < 0.05 * exact.std()
        assert torch.equal(torch.cat([layer.product(row[None], kernels) for row in x]), answer)


def test_the_engine_stays_within_the_bounds_of_int8(kernels: NativeKernels, tmp_path: Path) -> None:
    torch.manual_seed(0)
    common = toys.COMMON | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**common)).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), CPU, kernels.dtype, tmp_path, quantization="int8")
    groups = base.engine_model.groups
    assert all(kernels.quantized.takes_int8(group.in_features, sum(group.out_features)) for group in groups)
    harness = Harness(tmp_path, base)
    for index, prompt in enumerate(toys.prompts(4)):
        harness.add(index, prompt)
    harness.run()
    for index, prompt in enumerate(toys.prompts(4)):
        expected = reference_logits(base, None, prompt + harness.tokens[index])[len(prompt) - 1 : -1]
        assert_within_bounds(base, torch.stack(harness.logits[index]), expected, index)
