"""Full checkpoints: loadable by plain transformers; those of another model are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import toys
from tests.bounds import assert_near
from tests.plugins.reference import logits, plain_model

from graftwork_plugins import Artifact, ArtifactError, FullWeights
from graftwork_plugins.builtin.strategies.full import FullConfig, FullTuning, graftwork_identify_artifact
from graftwork_plugins.testing import base_handle, make_rows, train_steps, write_artifact
from graftwork_server.base.describe import base_info
from graftwork_server.base.weights import map_base_model
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.base_model import resident_model
from graftwork_server.layers.models.causal import load_base


@pytest.mark.parametrize("architecture", list(toys.CONFIGS))
def test_transformers_reads_what_is_saved(tmp_path: Path, architecture: str) -> None:
    strategy = FullTuning()
    model = plain_model(toys.make_model(architecture, tmp_path / "base"))
    info = base_handle(model).info
    trainable = strategy.build(base_handle(model), FullConfig())
    train_steps(strategy, trainable, make_rows(vocabulary=toys.VOCAB), 2, 0.001)
    artifact = write_artifact(strategy.save(trainable), tmp_path / "tuned")
    assert artifact.names() == ["config.json", "generation_config.json", "model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "tuned" / "config.json").read_text()
    assert_near(logits(plain_model(tmp_path / "tuned")), logits(trainable.model))
    (delta,) = strategy.load(artifact, info)
    assert set(delta.tensors) == {name for name, _ in model.named_parameters()}
    assert graftwork_identify_artifact(artifact) == "full"
    # What transformers itself writes of the same model is read too.
    plain_model(tmp_path / "tuned").save_pretrained(tmp_path / "again")
    assert isinstance(strategy.load(Artifact(tmp_path / "again"), info)[0], FullWeights)


def test_it_is_saved_in_the_dtype_of_the_base_and_trained_in_float32(tmp_path: Path) -> None:
    strategy = FullTuning()
    model = plain_model(toys.make_model("llama", tmp_path / "base"), torch.bfloat16)
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
    info = base_handle(plain_model(path)).info
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ArtifactError, match="the base") as caught:
        FullTuning().load(Artifact(path), info)
    assert caught.value.key == key


def test_a_configuration_written_by_an_older_transformers_is_read(tmp_path: Path) -> None:
    path = toys.make_model("llama", tmp_path)
    info = base_handle(plain_model(path)).info
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
    info = base_handle(plain_model(path)).info
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


HEADS = {"llama": "lm_head.weight", "gpt2": "lm_head.weight"}
EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


def write_checkpoint(folder: Path, source: Path, **changes: Any) -> Path:
    """A copy of a checkpoint; changes: tensors by "head" and "embedding" (None: taken out), and keys of config.json."""
    config = json.loads((source / "config.json").read_text())
    names = {"head": HEADS, "embedding": EMBEDDINGS}
    tensors = load_file(source / "model.safetensors")
    for what in names.keys() & changes.keys():
        name = names[what][config["model_type"]]
        tensors.pop(name, None)
        if (tensor := changes.pop(what)) is not None:
            tensors[name] = tensor
    config = {key: value for key, value in (config | changes).items() if value is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def served_logits(base_dir: Path, checkpoint: Path) -> torch.Tensor:
    """Of a checkpoint beside a base, as the engine binds it."""
    base = load_base(str(base_dir), torch.device("cpu"), torch.float32, base_dir)
    info = base_info(base.engine_model.model, base.info)
    prepared = bind(base, "digest", FullTuning().load(Artifact(checkpoint), info))
    assert prepared.model is not None
    prepared.model.model.set_attn_implementation("eager")
    return logits(prepared.model.model)


@pytest.mark.parametrize("architecture", list(HEADS))
@pytest.mark.parametrize("base_ties", [True, False])
@pytest.mark.parametrize("case", ["own head", "same head", "says untied", "one tensor", "head alone", "key left out"])
def test_an_output_layer_is_the_one_that_transformers_gives_it(
    tmp_path: Path, architecture: str, base_ties: bool, case: str
) -> None:
    source = toys.make_model(architecture, tmp_path / "source")
    embedding = load_file(source / "model.safetensors")[EMBEDDINGS[architecture]]
    other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5)) * 0.2
    third = other.flip(0).contiguous()
    base = (
        write_checkpoint(tmp_path / "base", source, head=None, tie_word_embeddings=True)
        if base_ties
        else write_checkpoint(tmp_path / "base", source, head=third, tie_word_embeddings=False)
    )
    changes: dict[str, Any] = {
        "own head": {"head": other, "tie_word_embeddings": True},
        "same head": {"head": embedding.clone(), "tie_word_embeddings": True},
        "says untied": {"head": other, "tie_word_embeddings": False},
        "one tensor": {"head": None, "tie_word_embeddings": True},
        "head alone": {"head": embedding.clone(), "embedding": None, "tie_word_embeddings": True},
        "key left out": {"head": other, "tie_word_embeddings": None},
    }[case]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", source, **changes)
    expected = logits(plain_model(checkpoint))
    torch.testing.assert_close(served_logits(base, checkpoint), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("base_ties", [True, False])
def test_an_output_layer_that_is_missing_and_not_tied_is_refused(tmp_path: Path, base_ties: bool) -> None:
    source = toys.make_model("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    head = None if base_ties else tensors[EMBEDDINGS["llama"]].flip(0).contiguous()
    base = write_checkpoint(tmp_path / "base", source, head=head, tie_word_embeddings=base_ties)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", source, head=None, tie_word_embeddings=False)
    with pytest.raises(ArtifactError, match=r"no file has lm_head\.weight") as caught:
        FullTuning().load(Artifact(checkpoint), base_handle(plain_model(base)).info)
    assert caught.value.key == "lm_head.weight"


@pytest.mark.parametrize("architecture", list(HEADS))
def test_a_base_that_says_tied_and_has_its_own_head_is_mapped_and_tuned_with_it(
    tmp_path: Path, architecture: str
) -> None:
    source = toys.make_model(architecture, tmp_path / "source")
    shape = load_file(source / "model.safetensors")[EMBEDDINGS[architecture]].shape
    head = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.2
    base_dir = write_checkpoint(tmp_path / "base", source, head=head, tie_word_embeddings=True)
    base = load_base(str(base_dir), torch.device("cpu"), torch.float32, tmp_path)
    for model in (map_base_model(base.weights.info()), resident_model(base)):
        torch.testing.assert_close(logits(model), logits(plain_model(base_dir)), atol=1e-4, rtol=0)
    strategy = FullTuning()
    trainable = strategy.build(base_handle(map_base_model(base.weights.info())), FullConfig())
    assert {HEADS[architecture], EMBEDDINGS[architecture]} <= set(trainable.parameters)
    train_steps(strategy, trainable, make_rows(vocabulary=toys.VOCAB), 2, 0.001)
    write_artifact(strategy.save(trainable), tmp_path / "tuned")
    expected = logits(trainable.model)
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(plain_model(tmp_path / "tuned")), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(served_logits(base_dir, tmp_path / "tuned"), expected, atol=1e-4, rtol=0)
