"""Full checkpoints: loadable by plain transformers; those of another model are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import toys
from transformers import AutoModelForCausalLM

from graftwork_plugins import Artifact, ArtifactError, FullWeights
from graftwork_plugins.builtin.full import FullConfig, FullTuning, graftwork_identify_artifact
from graftwork_plugins.testing import base_handle, make_rows, train_steps, write_artifact


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in toys.prompts(3)])


@pytest.mark.parametrize("architecture", list(toys.CONFIGS))
def test_transformers_reads_what_is_saved(tmp_path: Path, architecture: str) -> None:
    strategy = FullTuning()
    model = loaded(toys.make_model(architecture, tmp_path / "base"))
    info = base_handle(model).info
    trainable = strategy.build(base_handle(model), FullConfig())
    train_steps(strategy, trainable, make_rows(vocabulary=toys.VOCAB), 2, 0.001)
    artifact = write_artifact(strategy.save(trainable), tmp_path / "tuned")
    assert artifact.names() == ["config.json", "generation_config.json", "model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "tuned" / "config.json").read_text()
    assert torch.allclose(logits(loaded(tmp_path / "tuned")), logits(trainable.model), atol=1e-5, rtol=0)
    (delta,) = strategy.load(artifact, info)
    assert set(delta.tensors) == {name for name, _ in model.named_parameters()}
    assert graftwork_identify_artifact(artifact) == "full"
    # What transformers itself writes of the same model is read too.
    loaded(tmp_path / "tuned").save_pretrained(tmp_path / "again")
    assert isinstance(strategy.load(Artifact(tmp_path / "again"), info)[0], FullWeights)


def test_it_is_saved_in_the_dtype_of_the_base_and_trained_in_float32(tmp_path: Path) -> None:
    strategy = FullTuning()
    model = loaded(toys.make_model("llama", tmp_path / "base"), torch.bfloat16)
    trainable = strategy.build(base_handle(model), FullConfig())
    assert {parameter.dtype for parameter in trainable.parameters.values()} == {torch.float32}
    assert "lm_head.weight" not in trainable.parameters  # tied to the embedding, and still so
    saved = strategy.save(trainable)
    assert {tensor.dtype for tensor in saved.tensors["model.safetensors"].values()} == {torch.bfloat16}
    assert saved.documents["config.json"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["GPT2LMHeadModel"]),
        ("model_type", "mistral"),
        ("hidden_size", 64),
        ("rms_norm_eps", 0.1),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_theta": 5000.0, "rope_type": "default"}),
    ],
)
def test_a_configuration_of_another_model_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = toys.make_model("llama", tmp_path)
    info = base_handle(loaded(path)).info
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ArtifactError, match="the base") as caught:
        FullTuning().load(Artifact(path), info)
    assert caught.value.key == key


def test_a_configuration_written_by_an_older_transformers_is_read(tmp_path: Path) -> None:
    path = toys.make_model("llama", tmp_path)
    info = base_handle(loaded(path)).info
    config = json.loads((path / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "float32", "head_dim": None}
    (path / "config.json").write_text(json.dumps(config))
    FullTuning().load(Artifact(path), info)
    (path / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(ArtifactError, match="rope_parameters"):
        FullTuning().load(Artifact(path), info)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    path = toys.make_model("llama", tmp_path)
    info = base_handle(loaded(path)).info
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name] * float("inf")}, weights)
    with pytest.raises(ArtifactError, match="finite") as caught:
        FullTuning().load(Artifact(path), info)
    assert caught.value.key == name
    save_file({name: tensors[name]}, path / "model-00001-of-00002.safetensors")
    save_file(tensors, weights)
    with pytest.raises(ArtifactError, match="in two files"):
        FullTuning().load(Artifact(path), info)
    for file in path.glob("*.safetensors"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ArtifactError, match="pickled"):
        FullTuning().load(Artifact(path), info)
