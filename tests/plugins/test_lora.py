"""LoRA: what plain PEFT writes is read exactly, and PEFT reads what was trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tests import toys
from tests.bounds import assert_near
from tests.plugins.reference import edited, keys, logits, peft_logits, plain_model, served_logits

from graftwork_plugins import Artifact, BaseInfo, ConfigError, DatasetInfo, DeviceInfo, LowRank
from graftwork_plugins.builtin.strategies.lora import Lora, LoraConfig, graftwork_identify_artifact
from graftwork_plugins.testing import base_handle, make_rows, train_steps, write_artifact

ARCHITECTURES = ("llama", "gpt2", "phi3")

PATTERNS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rslora": {"use_rslora": True, "r": 6, "lora_alpha": 5},
    "no task type": {"task_type": None},
    "gaussian": {"init_lora_weights": "gaussian"},
}
LLAMA_PATTERNS: dict[str, dict[str, Any]] = {
    "subset": {"target_modules": ["q_proj", "layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "exclude": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 5, "^model.layers.2.self_attn.k_proj": 2},
        "alpha_pattern": {
            "proj": 99,
            "down_proj": 7,
            "model.layers.0.self_attn.v_proj": 1,
            r"self_attn\.[qk]_proj": 20,
        },
        "use_rslora": True,
    },
}
CASES = [(architecture, name) for architecture in ARCHITECTURES for name in PATTERNS]
CASES += [("llama", name) for name in LLAMA_PATTERNS]


@pytest.mark.parametrize(("architecture", "case"), CASES)
def test_reads_what_peft_writes(models: dict[str, Path], tmp_path: Path, architecture: str, case: str) -> None:
    settings = {**PATTERNS, **LLAMA_PATTERNS}[case]
    adapter = toys.make_adapter(models[architecture], tmp_path, **settings)
    expected = peft_logits(models[architecture], adapter)
    assert torch.allclose(served_logits(Lora(), models[architecture], adapter), expected, atol=1e-4, rtol=0)
    assert graftwork_identify_artifact(Artifact(adapter)) == "lora"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_kit_applies_every_feature_as_peft_does(models: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    for name, settings in toys.lora_features(architecture).items():
        config = PeftLoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
        adapter = toys.make_peft(models[architecture], tmp_path / name, config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = peft_logits(models[architecture], adapter)
        assert torch.allclose(served_logits(Lora(), models[architecture], adapter), expected, atol=1e-4, rtol=0), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_reads_what_is_saved(models: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    strategy, model = Lora(), plain_model(models[architecture])
    config = LoraConfig.model_validate({"r": 4, "use_rslora": True, "rank_pattern": {r".*0.*": 2}})
    trainable = strategy.build(base_handle(model), config)
    train_steps(strategy, trainable, make_rows(vocabulary=toys.VOCAB), 5, 0.01)
    artifact = write_artifact(strategy.save(trainable), tmp_path)
    assert artifact.names() == ["adapter_config.json", "adapter_model.safetensors"]
    assert_near(peft_logits(models[architecture], tmp_path), logits(trainable.model))
    assert artifact.json("adapter_config.json")["base_model_name_or_path"] is None


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"target_modules": ["q_proj", "qq_proj"]}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"rank_pattern": {"nope": 4}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
    ],
)
def test_settings_that_match_nothing_are_refused(info: BaseInfo, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Lora().validate(LoraConfig.model_validate(settings), info)
    assert caught.value.field == field


def test_the_output_layer_can_be_adapted(models: dict[str, Path], tmp_path: Path) -> None:
    # Plain PEFT saves a copy of the base's output layer with it unless told not to.
    model = get_peft_model(
        plain_model(models["phi3"]), PeftLoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    ).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.allclose(served_logits(Lora(), models["phi3"], tmp_path), logits(model), atol=1e-4, rtol=0)


def test_scaling_of_each_module(adapter: Path, info: BaseInfo, tmp_path: Path) -> None:
    artifact = edited(adapter, tmp_path, keys(use_rslora=True, alpha_pattern={"q_proj": 2}))
    deltas: list[LowRank] = list(Lora().load(artifact, info))
    scalings = {delta.module.rpartition(".")[2]: delta.scaling for delta in deltas}
    assert scalings == pytest.approx({"q_proj": 2 / 8**0.5, "v_proj": 16 / 8**0.5})


def test_training_on_a_mixture_updates_its_linear_layers(models: dict[str, Path], tmp_path: Path) -> None:
    strategy, model = Lora(), plain_model(models["mixtral"])
    handle, config = base_handle(model), LoraConfig.model_validate({"r": 2})
    trainable = strategy.build(handle, config)
    device = DeviceInfo(type="cpu", total_memory_bytes=2**34, threads=1)
    estimate = strategy.estimate(config, handle.info, DatasetInfo(row_count=1, total_tokens=1), device)
    assert sum(parameter.numel() for parameter in trainable.parameters.values()) == estimate.trained_parameters
    artifact = write_artifact(strategy.save(trainable), tmp_path)
    deltas = strategy.load(artifact, handle.info)
    assert {delta.module for delta in deltas} == set(handle.info.linear_modules) - {"lm_head"}
