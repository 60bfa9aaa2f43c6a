"""Quantised layers, and which bases are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tests import toys
from tests.server.base.quantization_harness import quantised
from transformers import AutoConfig, AutoModelForCausalLM

from graftwork_plugins import FullWeights
from graftwork_server.base.quantization import (
    Int8Linear,
    Nf4Linear,
    QuantizedLinear,
    _int8_product,
    _product_in_floats,
    rows_to_int8,
)
from graftwork_server.errors import FailedPrecondition
from graftwork_server.layers.binding.adapter import bind

_NEGATIVE = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0.0]
_POSITIVE = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
NF4 = torch.tensor([*_NEGATIVE, *_POSITIVE])
"""The values of the 4-bit normal float, appendix E of arXiv:2305.14314."""


# ---------------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("sizes", [(64, 32), (48, 40), (16, 4)])
def test_nf4_is_the_paper_s(sizes: tuple[int, int]) -> None:
    weight = torch.randn(sizes[::-1], generator=torch.Generator().manual_seed(0))
    tensors = Nf4Linear.quantize(weight)
    empty = Nf4Linear.empty(*sizes)
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in empty.items()
    }
    flat = weight.flatten()
    scale = torch.cat([block.abs().max().expand(len(block)) for block in flat.split(64)])
    nearest = (flat / scale)[:, None].sub(NF4).abs().argmin(1)
    layer = Nf4Linear(sizes, tensors, None)
    torch.testing.assert_close(layer.dequantized(torch.float32), (NF4[nearest] * scale).view_as(weight))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_exact_product_of_rounded_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(40, 96, generator=generator), torch.randn(2, 7, 96, generator=generator).to(dtype)
    x[0, 3] = 0
    bias = torch.randn(40, generator=generator).to(dtype)
    layer = Int8Linear((96, 40), Int8Linear.quantize(weight), bias)
    assert (layer.dequantized(torch.float32) - weight).abs().max() <= weight.abs().max() / 254 * 1.001
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (x.double() / scale).round() * scale, 0)
    expected = rounded @ layer.dequantized(torch.float32).double().t() + bias.double()
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2)
    assert layer(x).dtype == dtype


@torch.no_grad()
def test_int8_of_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Int8Linear((96, 40), Int8Linear.quantize(torch.randn(40, 96, generator=generator)), None)
    x = torch.randn(70, 96, generator=generator) * torch.logspace(-3, 3, 70)[:, None]
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone)


def test_the_product_where_torch_has_none_that_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (rows, 2100), generator=generator).to(torch.int8) for rows in (5, 7))
    x[0], weight[0], weight[1] = 127, 127, -127
    expected = x.double() @ weight.double().t()
    for product in (_product_in_floats, _int8_product):
        assert torch.equal(product(x, weight).double(), expected)


@torch.no_grad()
def test_what_is_not_finite_stays_so() -> None:
    layer = Int8Linear((8, 8), Int8Linear.quantize(torch.randn(8, 8)), None)
    for value in (float("nan"), float("inf")):
        assert not layer(torch.tensor([[value] + [1.0] * 7])).isfinite().any()
    assert torch.equal(rows_to_int8(torch.zeros(2, 8))[0], torch.zeros(2, 8, dtype=torch.int8))


@pytest.mark.parametrize("kind", [Nf4Linear, Int8Linear])
def test_gradients_are_those_of_the_dequantised_weight(kind: type[QuantizedLinear]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = kind((64, 24), kind.quantize(torch.randn(24, 64, generator=generator)), torch.randn(24))
    plain = layer.plain()
    x = torch.randn(5, 64, generator=generator)
    gradients = []
    for module in (layer, plain):
        inputs = x.clone().requires_grad_()
        module(inputs).square().sum().backward()
        assert inputs.grad is not None
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


# ---------------------------------------------------------------------------------------------- refusals


def refusal(directory: Path, kind: str) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as raised:
        quantised(directory, kind)
    assert "\n" not in raised.value.message
    return raised.value


def test_stacked_experts_are_refused_by_name(tmp_path: Path) -> None:
    error = refusal(toys.make_model("mixtral", tmp_path / "mixtral"), "nf4")
    assert error.reason == "MODEL_UNSUPPORTED"
    assert "gate_up_proj" in error.message


def test_weights_that_are_stored_quantised_are_refused(tmp_path: Path) -> None:
    directory = toys.make_model("llama", tmp_path / "model")
    config = AutoConfig.from_pretrained(directory)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(directory)
    for kind in ("none", "nf4"):
        error = refusal(directory, kind)
        assert error.reason == "MODEL_UNSUPPORTED"
        assert "stored quantised" in error.message


def test_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    directory = toys.make_model("llama", tmp_path / "model")
    base = quantised(directory, "int8")
    tensors = dict(AutoModelForCausalLM.from_pretrained(directory).state_dict())
    with pytest.raises(FailedPrecondition, match="--quantization none"):
        bind(base, "", [FullWeights(tensors=tensors)])


def test_a_missing_library_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    directory = toys.make_model("llama", tmp_path / "model")
    error = refusal(directory, "nf4")
    assert error.reason == "BITSANDBYTES_MISSING"
    assert "graftwork[quant]" in error.message
    quantised(directory, "int8")  # needs none on a CPU
