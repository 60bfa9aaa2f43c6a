"""LoRA artifacts that are not served: each is refused, and the refusal names the key or tensor."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from tests import toys
from tests.plugins.reference import Edit, edited, keys, plain_model

from graftwork_plugins import Artifact, ArtifactError, BaseInfo
from graftwork_plugins.builtin.strategies.lora import Lora
from graftwork_plugins.testing import base_handle

KEYS: list[tuple[str, Any]] = [
    ("peft_type", "LOHA"),
    ("task_type", "TOKEN_CLS"),
    ("bias", "some"),
    ("use_dora", "yes"),
    ("lora_bias", 1),
    ("modules_to_save", "lm_head"),
    ("modules_to_save", ["score"]),
    ("trainable_token_indices", 3),
    ("trainable_token_indices", {"embed_tokens": ["a"]}),
    ("ensure_weight_tying", "yes"),
    ("target_parameters", ["experts"]),
    ("layer_replication", [[0, 2]]),
    ("megatron_config", {"a": 1}),
    ("megatron_core", "os"),
    ("monteclora_config", {"a": 1}),
    ("kasa_config", {"a": 1}),
    ("use_bdlora", {"a": 1}),
    ("alora_invocation_tokens", [1, 2]),
    ("use_qalora", True),
    ("arrow_config", {"top_k": 1}),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "loftq"),
    ("a_key_of_the_future", "on"),
    ("auto_mapping", {"base_model_class": "x", "parent_library": "this"}),
    ("auto_mapping", {"parent_library": "transformers.models.llama", "custom": "os"}),
    ("r", 0),
    ("r", 2.5),
    ("r", True),
    ("lora_alpha", "16"),
    ("lora_alpha", float("nan")),
    ("use_rslora", "yes"),
    ("rank_pattern", [1]),
    ("rank_pattern", {"q_proj": -1}),
    ("alpha_pattern", {"q_proj": float("inf")}),
    ("target_modules", {"q_proj": 1}),
    ("layers_to_transform", ["0"]),
]


@pytest.mark.parametrize(("key", "value"), KEYS, ids=[f"{key}={value}" for key, value in KEYS])
def test_a_setting_that_is_not_served_is_refused_by_name(
    adapter: Path, info: BaseInfo, tmp_path: Path, key: str, value: Any
) -> None:
    artifact = edited(adapter, tmp_path, keys(**{key: value}))
    with pytest.raises(ArtifactError, match="accepted") as caught:
        Lora().load(artifact, info)
    assert caught.value.key == key
    assert key in caught.value.message


def rename(old: str, new: str) -> Edit:
    return lambda config, tensors: tensors.update({new: tensors.pop(old)})


EMBEDDING = "base_model.model.model.embed_tokens"
TOKENS = ".token_adapter.trainable_tokens_delta"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[Edit, str, str]] = {
    "unknown name": (rename(f"{Q0}.lora_A.weight", f"{Q0}.lora_C.weight"), f"{Q0}.lora_C.weight", "not supported"),
    "embedding without B": (
        lambda config, tensors: [
            tensors.update({f"{EMBEDDING}.lora_embedding_A": torch.ones(8, 160)}),
            config.update({"target_modules": [*config["target_modules"], "embed_tokens"]}),
        ],
        f"{EMBEDDING}.lora_embedding_B",
        "lora_embedding_A but no lora_embedding_B",
    ),
    "embedding of a linear layer": (
        rename(f"{Q0}.lora_A.weight", f"{Q0}.lora_embedding_A"),
        f"{Q0}.lora_embedding_A",
        "which the base has not",
    ),
    "no magnitudes": (
        keys(use_dora=True),
        f"{Q0}.lora_magnitude_vector",
        "is missing, but adapter_config.json has use_dora",
    ),
    "magnitudes' shape": (
        lambda config, tensors: [
            config.update({"use_dora": True, "target_modules": ["layers.0.self_attn.q_proj"]}),
            [tensors.pop(name) for name in list(tensors) if not name.startswith(Q0)],
            tensors.update({f"{Q0}.lora_magnitude_vector": torch.ones(1, 48)}),
        ],
        f"{Q0}.lora_magnitude_vector",
        r"\[1, 48\]; this base takes \[48\]",
    ),
    "saved module's tensor missing": (
        keys(modules_to_save=["model.norm"]),
        "modules_to_save",
        "has no base_model.model.model.norm.weight",
    ),
    "saved module's tensor not asked for": (
        lambda config, tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(48)}),
        "base_model.model.model.norm.weight",
        "modules_to_save does not name",
    ),
    "parameters of experts": (
        keys(target_parameters=["mlp.experts.gate_up_proj"]),
        "target_parameters",
        "which the base has not; this base has no experts",
    ),
    "parameters of a linear layer": (
        keys(target_parameters=["q_proj.weight"]),
        "target_parameters",
        "which is of no mixture of experts",
    ),
    "token rows missing": (
        keys(trainable_token_indices=[3]),
        "trainable_token_indices",
        "has no trainable_tokens_delta",
    ),
    "token rows not asked for": (
        lambda config, tensors: tensors.update({f"{EMBEDDING}{TOKENS}": torch.ones(1, 48)}),
        f"{EMBEDDING}{TOKENS}",
        "trainable_token_indices does not name",
    ),
    "token rows of another number": (
        lambda config, tensors: [
            config.update({"trainable_token_indices": [3, 4]}),
            tensors.update({f"{EMBEDDING}{TOKENS}": torch.ones(1, 48)}),
        ],
        f"{EMBEDDING}{TOKENS}",
        r"say \[2, 48\]",
    ),
    "token beyond the vocabulary": (
        lambda config, tensors: [
            config.update({"trainable_token_indices": [160]}),
            tensors.update({f"{EMBEDDING}{TOKENS}": torch.ones(1, 48)}),
        ],
        "trainable_token_indices",
        "from 0 to 159",
    ),
    "dora": (
        lambda config, tensors: tensors.update({f"{Q0}.lora_magnitude_vector": torch.ones(2)}),
        f"{Q0}.lora_magnitude_vector",
        "DoRA",
    ),
    "base weights": (
        lambda config, tensors: tensors.update({f"{Q0}.base_layer.weight": torch.ones(48, 48)}),
        f"{Q0}.base_layer.weight",
        "modules_to_save does not name",
    ),
    "bias": (
        lambda config, tensors: tensors.update({f"{Q0}.lora_B.bias": torch.ones(2)}),
        f"{Q0}.lora_B.bias",
        "bias",
    ),
    "unknown module": (
        rename(f"{Q0}.lora_A.weight", f"{Q0.replace('.0.', '.9.')}.lora_A.weight"),
        f"{Q0.replace('.0.', '.9.')}.lora_A.weight",
        r"closest is model\.layers\.\d\.self_attn\.q_proj",
    ),
    "A alone": (
        lambda config, tensors: tensors.pop(f"{Q0}.lora_B.weight"),
        f"{Q0}.lora_B.weight",
        "lora_A but no lora_B",
    ),
    "both missing": (
        lambda config, tensors: [tensors.pop(f"{Q0}.lora_{matrix}.weight") for matrix in "AB"],
        Q0.removeprefix("base_model.model."),
        "target_modules names",
    ),
    "not a target": (
        keys(target_modules=["v_proj"]),
        Q0.removeprefix("base_model.model."),
        "which target_modules .* does not name",
    ),
    "layer not chosen": (
        keys(layers_to_transform=[1]),
        Q0.removeprefix("base_model.model."),
        "which target_modules .* does not name",
    ),
    "in_features": (
        lambda config, tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(8, 47)}),
        f"{Q0}.lora_A.weight",
        r"takes 47 features; the base's layer has 48 \(in\) and 48 \(out\)",
    ),
    "out_features": (
        lambda config, tensors: tensors.update({f"{Q0}.lora_B.weight": torch.ones(49, 8)}),
        f"{Q0}.lora_B.weight",
        "gives 49 features",
    ),
    "ranks differ": (
        lambda config, tensors: tensors.update({f"{Q0}.lora_B.weight": torch.ones(48, 7)}),
        f"{Q0}.lora_B.weight",
        "rank 8, lora_B 7",
    ),
    "rank against r": (
        keys(r=4),
        f"{Q0}.lora_A.weight",
        "has rank 8; r and rank_pattern .* say 4",
    ),
    "one dimension": (
        lambda config, tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(8)}),
        f"{Q0}.lora_A.weight",
        "a matrix is expected",
    ),
    "integers": (
        lambda config, tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(8, 48, dtype=torch.int32)}),
        f"{Q0}.lora_A.weight",
        "int32",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    adapter: Path, info: BaseInfo, tmp_path: Path, case: str
) -> None:
    edit, key, message = TENSORS[case]
    artifact = edited(adapter, tmp_path, edit)
    with pytest.raises(ArtifactError, match=message) as caught:
        Lora().load(artifact, info)
    assert caught.value.key == key


def test_damaged_files_are_refused(adapter: Path, info: BaseInfo, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    for name, content in {
        "truncated": weights.read_bytes()[:-100],
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "empty": b"",
    }.items():
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        (folder / weights.name).write_bytes(content)
        with pytest.raises(ArtifactError, match="safetensors"):
            Lora().load(Artifact(folder), info)


def test_pickled_weights_are_refused(adapter: Path, info: BaseInfo, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="pickle"):
        Lora().load(Artifact(tmp_path), info)


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_a_pattern_bomb_ends_quickly(adapter: Path, info: BaseInfo, tmp_path: Path, key: str) -> None:
    bomb = r"(.|..|.\w)+\d\d"
    value: Any = bomb if key == "target_modules" else {bomb: 8}
    artifact = edited(adapter, tmp_path, keys(**{key: value}))
    started = time.monotonic()
    with pytest.raises(ArtifactError, match="too long to match"):
        Lora().load(artifact, info)
    assert time.monotonic() - started < 10


def test_a_broken_pattern_is_refused(adapter: Path, info: BaseInfo, tmp_path: Path) -> None:
    artifact = edited(adapter, tmp_path, keys(target_modules="(q_proj"))
    with pytest.raises(ArtifactError, match="no regular expression"):
        Lora().load(artifact, info)


def test_tensors_that_peft_would_not_load_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """PEFT saves an update of GPT-2's output layer that it ties to the embedding's, and drops it when it loads."""
    config = PeftLoraConfig(target_modules=["c_attn", "lm_head"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    artifact = Artifact(toys.make_peft(models["gpt2"], tmp_path, config))
    with pytest.raises(ArtifactError, match=r"has tensors of lm_head, which target_modules .* does not name"):
        Lora().load(artifact, base_handle(plain_model(models["gpt2"])).info)


@pytest.mark.parametrize(
    ("suffix", "tensor", "says"),
    [
        ("lora_A.weight", torch.ones(7, 80), r"\[7, 80\]; for down_proj with 4 experts and the rank 2 .* \[8, 80\]"),
        ("base_layer.lora_B.weight", torch.ones(160, 9), r"for gate_up_proj .* \[160, 8\]"),
        ("base_layer.lora_A.weight", None, "target_parameters names .*gate_up_proj, but"),
        ("base_layer.base_layer.lora_A.weight", torch.ones(8, 48), "has tensors of .*base_layer.base_layer, which"),
    ],
)
def test_updates_of_experts_that_do_not_fit_are_refused(
    models: dict[str, Path], tmp_path: Path, suffix: str, tensor: torch.Tensor | None, says: str
) -> None:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = PeftLoraConfig(r=2, target_modules=[], target_parameters=parameters, task_type="CAUSAL_LM")
    adapter = toys.make_peft(models["mixtral"], tmp_path / "adapter", config)
    name = f"base_model.model.model.layers.1.mlp.experts.{suffix}"

    def edit(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    with pytest.raises(ArtifactError, match=says):
        Lora().load(edited(adapter, tmp_path / "edited", edit), base_handle(plain_model(models["mixtral"])).info)
