"""IA3 artifacts: PEFT's in both directions; what does not fit is refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import toys
from tests.bounds import assert_near
from tests.plugins.reference import logits, peft_logits, plain_model, served_logits

from graftwork_plugins import Artifact, ArtifactError, BaseInfo, ConfigError
from graftwork_plugins.builtin.strategies.ia3 import Ia3, Ia3Config, graftwork_identify_artifact
from graftwork_plugins.testing import base_handle, make_rows, train_steps, write_artifact

K0 = "base_model.model.model.layers.0.self_attn.q_proj.ia3_l"


@pytest.fixture(params=["llama", "gpt2"])
def model_dir(request: pytest.FixtureRequest, models: dict[str, Path]) -> Path:
    return models[request.param]


@pytest.fixture
def artifact(llama: Path, tmp_path: Path) -> Artifact:
    return Artifact(toys.make_peft(llama, tmp_path / "ia3", toys.other_peft_configs("llama")["ia3"]))


@pytest.mark.parametrize("case", ["ia3", "ia3 with a norm"])
def test_reads_what_peft_writes(model_dir: Path, tmp_path: Path, case: str) -> None:
    toys.make_peft(model_dir, tmp_path, toys.other_peft_configs(model_dir.name)[case])
    expected = peft_logits(model_dir, tmp_path)
    assert torch.allclose(served_logits(Ia3(), model_dir, tmp_path), expected, atol=1e-4, rtol=0)
    assert graftwork_identify_artifact(Artifact(tmp_path)) == "ia3"


def test_peft_reads_what_is_trained_with_defaults(model_dir: Path, tmp_path: Path) -> None:
    strategy, model = Ia3(), plain_model(model_dir)
    handle = base_handle(model)
    strategy.validate(Ia3Config(), handle.info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainable = strategy.build(handle, Ia3Config())
        train_steps(strategy, trainable, make_rows(vocabulary=toys.VOCAB), 5, 0.01)
        write_artifact(strategy.save(trainable), tmp_path)
        by_peft = peft_logits(model_dir, tmp_path)
    assert_near(by_peft, logits(trainable.model))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task_type", "SEQ_CLS"),
        ("target_modules", None),
        ("feedforward_modules", 3),
        ("modules_to_save", "norm"),
        ("a_key_of_the_future", 1),
    ],
)
def test_a_setting_that_is_not_served_is_refused_by_name(
    artifact: Artifact, info: BaseInfo, key: str, value: Any
) -> None:
    path = artifact.path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ArtifactError, match="accepted") as caught:
        Ia3().load(artifact, info)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        (K0, torch.ones(47, 1), r"\[47, 1\]; .* must be \[48, 1\]"),
        (K0, torch.ones(1, 48), r"must be \[48, 1\]"),
        (K0, torch.full((48, 1), float("inf")), "not finite"),
        (K0, None, "names model.layers.0.self_attn.q_proj, but"),
        (K0.replace("q_proj", "x_proj"), torch.ones(48, 1), "which the base has not; the closest is"),
        (K0.replace("q_proj", "k_proj"), torch.ones(16, 1), "target_modules .* does not name"),
        ("base_model.model.model.norm.weight", torch.ones(48), "not supported"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    artifact: Artifact, info: BaseInfo, name: str, tensor: torch.Tensor | None, says: str
) -> None:
    path = artifact.path / "adapter_model.safetensors"
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=says):
        Ia3().load(artifact, info)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"target_modules": ["kk_proj"]}, "target_modules"),
        ({"feedforward_modules": ["nope"]}, "feedforward_modules"),
        ({"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}, "feedforward_modules"),
    ],
)
def test_settings_that_match_nothing_are_refused(info: BaseInfo, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Ia3().validate(Ia3Config.model_validate(settings), info)
    assert caught.value.field == field
