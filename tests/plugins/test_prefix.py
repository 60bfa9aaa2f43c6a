"""PEFT's prompt learning files: read as they are; what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import toys

from graftwork_plugins import Artifact, ArtifactError, BaseInfo, TrainingConfig
from graftwork_plugins.builtin.strategies.prefix import PrefixStrategy, graftwork_identify_artifact


@pytest.fixture
def artifact(llama: Path, tmp_path: Path) -> Artifact:
    config = toys.other_peft_configs("llama")["prefix tuning"]
    return Artifact(toys.make_peft(llama, tmp_path, config))


def test_keys_and_values_of_each_layer(artifact: Artifact, info: BaseInfo) -> None:
    assert graftwork_identify_artifact(artifact) == "prefix"
    (prefix,) = PrefixStrategy().load(artifact, info)
    saved = load_file(artifact.path / "adapter_model.safetensors")["prompt_embeddings"]  # [7, layers * 2 * heads * dim]
    assert [list(key.shape) for key in prefix.keys] == 3 * [[2, 7, 8]]
    flat = torch.cat([t.transpose(0, 1).reshape(7, -1) for pair in zip(prefix.keys, prefix.values) for t in pair], 1)  # noqa: B905
    assert torch.equal(flat, saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "MULTITASK_PROMPT_TUNING"),
        ("task_type", "SEQ_CLS"),
        ("num_transformer_submodules", 2),
        ("num_virtual_tokens", 0),
        ("num_layers", "3"),
        ("token_dim", None),
        ("modules_to_save", ["lm_head"]),
        ("a_key_of_the_future", 1),
    ],
)
def test_a_setting_that_is_not_served_is_refused_by_name(
    artifact: Artifact, info: BaseInfo, key: str, value: Any
) -> None:
    path = artifact.path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ArtifactError, match="accepted") as caught:
        PrefixStrategy().load(artifact, info)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "is missing"),
        ({"prompt_embeddings": torch.ones(7, 95)}, r"\[7, 95\]; adapter_config.json says \[7, 96\]"),
        ({"prompt_embeddings": torch.ones(7, 96, dtype=torch.int64)}, "int64"),
        ({"prompt_embeddings": torch.full((7, 96), float("nan"))}, "not finite"),
        ({"prompt_embeddings": torch.ones(7, 96), "base_model.lm_head.weight": torch.ones(1)}, "alone is accepted"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    artifact: Artifact, info: BaseInfo, tensors: dict[str, torch.Tensor], says: str
) -> None:
    save_file(tensors, artifact.path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=says):
        PrefixStrategy().load(artifact, info)


def test_it_declares_that_it_cannot_train(info: BaseInfo) -> None:
    assert PrefixStrategy.capabilities == {"serve"}
    with pytest.raises(NotImplementedError, match="does not train"):
        PrefixStrategy().estimate(TrainingConfig(), info, None, None)  # type: ignore[arg-type]
