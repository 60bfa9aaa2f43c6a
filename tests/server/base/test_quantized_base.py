"""Served models on quantised bases, against transformers and PEFT over the dequantised weights, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests import toys
from tests.server.base.quantization_harness import (
    INT8_MEAN,
    INT8_MOST,
    KINDS,
    assert_within_bounds,
    layers,
    quantised,
    reference_logits,
)
from tests.server.engine.adapters.test_peft_features import load
from tests.server.engine.harness import CPU, Harness

from graftwork_server.base.describe import base_info
from graftwork_server.base.weights import map_base_model
from graftwork_server.kernels.attention.packed import packed_rows
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3", "gpt2", "phi3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_model(request.param, tmp_path_factory.mktemp(request.param) / request.param)


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, model_dir: Path) -> BaseModel:
    return quantised(model_dir, request.param)


def features(architecture: str) -> dict[str, dict[str, Any]]:
    """Of toys.lora_features, one for each way in which binding touches a quantised layer."""
    wanted = ("lora", "all biases", "lora_bias", "output layer", "whole mlp", "embedding", "dora", "dora and biases")
    return {name: settings for name, settings in toys.lora_features(architecture).items() if name in wanted}


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


def names_of(deltas: Sequence[Any]) -> list[str]:
    return sorted(delta.module for delta in deltas)


def test_adapters_bind_as_on_the_unquantised_base(base: BaseModel, model_dir: Path, tmp_path: Path) -> None:
    artifact = toys.make_adapter(model_dir, tmp_path / "adapter")
    plain = load_base(str(model_dir), CPU, torch.float32, model_dir)
    assert names_of(load(artifact, base)) == names_of(load(artifact, plain))
    reports = [bind(of, "", load(artifact, of)) for of in (base, plain)]
    assert len({(report.modules_bound, report.rank, report.device_bytes, report.ranks) for report in reports}) == 1
