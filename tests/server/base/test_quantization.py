"""Quantised bases against transformers and PEFT over the dequantised weights, in float32.

nf4 multiplies with the dequantised weights: the usual bound of 1e-4. int8 rounds the inputs of each layer as well; its
bounds are of this file's random models, whose weights are ten times larger than trained ones and amplify it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from tests import toys
from tests.server.engine.adapters.test_peft_features import load
from tests.server.engine.harness import CPU, Harness
from transformers import AutoConfig, AutoModelForCausalLM

from graftwork_plugins import FullWeights
from graftwork_server.base.describe import base_info
from graftwork_server.base.quantization import (
    Int8Linear,
    Nf4Linear,
    QuantizedLinear,
    _int8_product,
    _product_in_floats,
    rows_to_int8,
)
from graftwork_server.base.weights import map_base_model
from graftwork_server.engine.adapters.bind import bind
from graftwork_server.engine.models.base import BaseModel
from graftwork_server.engine.models.causal import load_base
from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.attention.packed import packed_rows

KINDS = ("nf4", "int8")
INT8_MOST, INT8_MEAN = 0.5, 0.06
"""Bounds of int8's logits, of their standard deviation: the largest difference, and the mean one."""

_NEGATIVE = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0.0]
_POSITIVE = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
NF4 = torch.tensor([*_NEGATIVE, *_POSITIVE])
"""The values of the 4-bit normal float, appendix E of arXiv:2305.14314."""


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3", "gpt2", "phi3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_model(request.param, tmp_path_factory.mktemp(request.param) / request.param)


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, model_dir: Path) -> BaseModel:
    return quantised(model_dir, request.param)


def quantised(model_dir: Path, kind: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    return load_base(str(model_dir), CPU, dtype, model_dir, quantization=kind)


def layers(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    """Quantised layers by their names in the plain model."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    return {name.removesuffix(".base"): module for name, module in found.items()}


def dequantised(base: BaseModel) -> Any:
    """transformers' own model, with the weights that the base's layers stand for."""
    model = AutoModelForCausalLM.from_pretrained(base.info.source, dtype=torch.float32).eval()
    for name, layer in layers(base.engine_model.model).items():
        weight = layer.dequantized(torch.float32)
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(weight.t() if layer.is_conv1d else weight)
    return model


def reference_logits(base: BaseModel, artifact: Path | None, row: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] of the dequantised model with an adapter, by PEFT."""
    model = dequantised(base)
    if artifact is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, artifact).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([row])).logits[0]
    return logits


def assert_within_bounds(base: BaseModel, logits: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    difference = (logits - expected).abs()
    if base.info.quantization == "nf4":
        assert difference.max() < 1e-4, f"{what}: {difference.max()}"
        return
    spread = expected.std()
    assert difference.max() < INT8_MOST * spread, f"{what}: {difference.max() / spread} of the spread"
    assert difference.mean() < INT8_MEAN * spread, f"{what}: {difference.mean() / spread} of the spread"


def features(architecture: str) -> dict[str, dict[str, Any]]:
    """Of toys.lora_features, one for each way in which binding touches a quantised layer."""
    wanted = ("lora", "all biases", "lora_bias", "output layer", "whole mlp", "embedding", "dora", "dora and biases")
    return {name: settings for name, settings in toys.lora_features(architecture).items() if name in wanted}


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


# ---------------------------------------------------------------------------------------------- the served model


def test_mixed_equals_peft_over_the_dequantised_model(base: BaseModel, tmp_path: Path) -> None:
    settings = features(Path(base.info.source).name)
    usual = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    artifacts = {
        name: toys.make_peft(Path(base.info.source), tmp_path / name, LoraConfig(**usual | of_this), seed=seed)
        for seed, (name, of_this) in enumerate(settings.items())
    }
    harness = Harness(Path(base.info.source), base, max_step_tokens=200, max_sequences=32)
    refs: dict[str | None, Any] = {name: harness.place(name, load(path, base)) for name, path in artifacts.items()}
    refs[None] = None
    prompts = dict(zip(refs, toys.prompts(len(refs)), strict=True))
    for index, (name, ref) in enumerate(refs.items()):
        harness.add(index, prompts[name], ref, max_tokens=8)
    harness.run()
    for index, name in enumerate(refs):
        tokens = harness.tokens[index]
        row = prompts[name] + tokens
        expected = reference_logits(base, artifacts[name] if name else None, row)[len(prompts[name]) - 1 : -1]
        assert_within_bounds(base, torch.stack(harness.logits[index]), expected, name)
        if base.info.quantization == "nf4":
            assert tokens == expected.argmax(-1).tolist(), name

    for name in artifacts:
        harness.engine.adapters.unload(name)
    assert harness.engine.adapters.used_bytes == 0
    for index, name in enumerate(refs):
        ref = None if name is None else harness.place(name, load(artifacts[name], base))
        harness.add(100 + index, prompts[name], ref, max_tokens=8)
        harness.run()
        if base.info.quantization == "nf4":
            assert harness.tokens[100 + index] == harness.tokens[index], name


def test_bfloat16_stays_near_the_dequantised_model(model_dir: Path) -> None:
    for kind in KINDS:
        base = quantised(model_dir, kind, torch.bfloat16)
        harness = Harness(model_dir, base)
        for index, prompt in enumerate(toys.prompts(3)):
            harness.add(index, prompt)
        harness.run()
        for index, prompt in enumerate(toys.prompts(3)):
            expected = reference_logits(base, None, prompt + harness.tokens[index])[len(prompt) - 1 : -1]
            difference = (torch.stack(harness.logits[index]) - expected).abs() / expected.std()
            assert difference.max() < INT8_MOST
            assert difference.mean() < INT8_MEAN


def test_virtual_tokens_are_computed_by_the_quantised_model(model_dir: Path, tmp_path: Path) -> None:
    config = toys.other_peft_configs(model_dir.name)["prompt tuning"]
    artifact = toys.make_peft(model_dir, tmp_path / "prompt", config)
    base = quantised(model_dir, "nf4")
    harness = Harness(model_dir, base)
    prompt = toys.prompts(1)[0]
    harness.add(0, prompt, harness.place("prompt", load(artifact, base)), max_tokens=6)
    harness.run()
    row = prompt + harness.tokens[0]
    expected = reference_logits(base, artifact, row)[-len(row) :][len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack(harness.logits[0]), expected, atol=1e-4, rtol=0)


def test_ia3_scales_what_goes_into_a_quantised_layer(model_dir: Path, tmp_path: Path) -> None:
    artifact = toys.make_peft(model_dir, tmp_path / "ia3", toys.other_peft_configs(model_dir.name)["ia3"])
    base = quantised(model_dir, "nf4")
    harness = Harness(model_dir, base)
    prompt = toys.prompts(1)[0]
    harness.add(0, prompt, harness.place("ia3", load(artifact, base)), max_tokens=6)
    harness.run()
    expected = reference_logits(base, artifact, prompt + harness.tokens[0])[len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack(harness.logits[0]), expected, atol=1e-4, rtol=0)


def test_all_layers_but_the_output_are_quantised_and_still_computed_together(base: BaseModel, model_dir: Path) -> None:
    plain = load_base(str(model_dir), CPU, torch.float32, model_dir)
    model = base.engine_model.model
    info, plain_info = base_info(model, base.info), base_info(plain.engine_model.model, plain.info)
    assert set(layers(model)) == set(info.linear_modules) - {info.output_module}
    assert [group.names for group in base.engine_model.groups] == [group.names for group in plain.engine_model.groups]
    # To strategies and to the registry it is the same base.
    assert info.quantization == base.info.quantization
    for field in ("fingerprint", "linear_modules", "embedding_modules", "tied_modules", "parameters"):
        assert getattr(info, field) == getattr(plain_info, field), field
    assert base.info.parameter_count == plain.info.parameter_count


def test_weights_take_what_the_layers_say(base: BaseModel, model_dir: Path) -> None:
    plain = load_base(str(model_dir), CPU, torch.float32, model_dir)
    linear = sum(layer.in_features * layer.out_features for layer in layers(base.engine_model.model).values())
    saved = plain.info.weight_bytes - base.info.weight_bytes
    bits = {"nf4": 4.5, "int8": 8}[base.info.quantization]
    scales = sum(4 * layer.out_features for layer in layers(base.engine_model.model).values())
    slack = 64 * len(base.weights.layout) + scales  # alignment
    assert abs(saved - linear * (32 - bits) / 8) <= slack


def test_a_tuner_maps_the_same_block(base: BaseModel) -> None:
    mapped = map_base_model(base.weights.info())
    assert base.weights.info().quantization == base.info.quantization
    rows = toys.prompts(3, seed=1)
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[position for row in rows for position in range(len(row))]])
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row))
    with torch.no_grad(), packed_rows(offsets):
        packed = mapped(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    assert_within_bounds(base, packed, torch.cat([reference_logits(base, None, row) for row in rows]), "mapped")
    before = base.weights.block.clone()
    name, layer = next(iter(layers(mapped).items()))
    assert torch.equal(layer.weight, layers(base.engine_model.model)[name].weight)
    layer.weight.data.fill_(7)
    assert torch.equal(base.weights.block, before)


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


def names_of(deltas: Sequence[Any]) -> list[str]:
    return sorted(delta.module for delta in deltas)


def test_adapters_bind_as_on_the_unquantised_base(base: BaseModel, model_dir: Path, tmp_path: Path) -> None:
    artifact = toys.make_adapter(model_dir, tmp_path / "adapter")
    plain = load_base(str(model_dir), CPU, torch.float32, model_dir)
    assert names_of(load(artifact, base)) == names_of(load(artifact, plain))
    reports = [bind(of, "", load(artifact, of)) for of in (base, plain)]
    assert len({(report.modules_bound, report.rank, report.device_bytes, report.ranks) for report in reports}) == 1
