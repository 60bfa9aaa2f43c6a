"""LoRA artifacts: what plain PEFT writes is read exactly; everything else is refused by name."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import toys
from tests.bounds import assert_near
from transformers import AutoModelForCausalLM

from graftwork_plugins import Artifact, ArtifactError, BaseInfo, ConfigError, DatasetInfo, DeviceInfo, LowRank
from graftwork_plugins.builtin.strategies.lora import Lora, LoraConfig, graftwork_identify_artifact
from graftwork_plugins.testing import apply_deltas, base_handle, make_rows, train_steps, write_artifact

ARCHITECTURES = ("llama", "gpt2", "phi3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models by architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {name: toys.make_model(name, folder / name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def info(models: dict[str, Path]) -> BaseInfo:
    """The Llama as strategies see it."""
    return base_handle(plain_model(models["llama"])).info


@pytest.fixture(scope="module")
def adapter(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary adapter of the Llama."""
    return toys.make_adapter(models["llama"], tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "v_proj"])


def plain_model(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in toys.prompts(3)])


def edited(adapter: Path, folder: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> Artifact:
    """A copy of an adapter whose configuration and tensors `edit` has changed in place."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return Artifact(folder)


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
    expected = logits(PeftModel.from_pretrained(plain_model(models[architecture]), adapter).eval())
    served = plain_model(models[architecture])
    deltas = Lora().load(Artifact(adapter), base_handle(served).info)
    apply_deltas(served, deltas)
    assert torch.allclose(logits(served), expected, atol=1e-4, rtol=0)
    assert graftwork_identify_artifact(Artifact(adapter)) == "lora"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_kit_applies_every_feature_as_peft_does(models: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    for name, settings in toys.lora_features(architecture).items():
        config = PeftLoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
        adapter = toys.make_peft(models[architecture], tmp_path / name, config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = logits(PeftModel.from_pretrained(plain_model(models[architecture]), adapter).eval())
        served = plain_model(models[architecture])
        apply_deltas(served, Lora().load(Artifact(adapter), base_handle(served).info))
        assert torch.allclose(logits(served), expected, atol=1e-4, rtol=0), name


def test_tensors_that_peft_would_not_load_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """PEFT saves an update of GPT-2's output layer that it ties to the embedding's, and drops it when it loads."""
    config = PeftLoraConfig(target_modules=["c_attn", "lm_head"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    artifact = Artifact(toys.make_peft(models["gpt2"], tmp_path, config))
    with pytest.raises(ArtifactError, match=r"has tensors of lm_head, which target_modules .* does not name"):
        Lora().load(artifact, base_handle(plain_model(models["gpt2"])).info)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_reads_what_is_saved(models: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    strategy, model = Lora(), plain_model(models[architecture]).requires_grad_(False)
    config = LoraConfig.model_validate({"r": 4, "use_rslora": True, "rank_pattern": {r".*0.*": 2}})
    trainable = strategy.build(base_handle(model), config)
    train_steps(strategy, trainable, make_rows(vocabulary=toys.VOCAB), 5, 0.01)
    artifact = write_artifact(strategy.save(trainable), tmp_path)
    assert artifact.names() == ["adapter_config.json", "adapter_model.safetensors"]
    by_peft = PeftModel.from_pretrained(plain_model(models[architecture]), tmp_path).eval()
    assert_near(logits(by_peft), logits(trainable.model))
    assert artifact.json("adapter_config.json")["base_model_name_or_path"] is None


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
    artifact = edited(adapter, tmp_path, lambda config, tensors: config.update({key: value}))
    with pytest.raises(ArtifactError, match="accepted") as caught:
        Lora().load(artifact, info)
    assert caught.value.key == key
    assert key in caught.value.message


def rename(old: str, new: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], object]:
    return lambda config, tensors: tensors.update({new: tensors.pop(old)})


EMBEDDING = "base_model.model.model.embed_tokens"
TOKENS = ".token_adapter.trainable_tokens_delta"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], object], str, str]] = {
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
        lambda config, tensors: config.update({"use_dora": True}),
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
        lambda config, tensors: config.update({"modules_to_save": ["model.norm"]}),
        "modules_to_save",
        "has no base_model.model.model.norm.weight",
    ),
    "saved module's tensor not asked for": (
        lambda config, tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(48)}),
        "base_model.model.model.norm.weight",
        "modules_to_save does not name",
    ),
    "parameters of experts": (
        lambda config, tensors: config.update({"target_parameters": ["mlp.experts.gate_up_proj"]}),
        "target_parameters",
        "which the base has not; this base has no experts",
    ),
    "parameters of a linear layer": (
        lambda config, tensors: config.update({"target_parameters": ["q_proj.weight"]}),
        "target_parameters",
        "which is of no mixture of experts",
    ),
    "token rows missing": (
        lambda config, tensors: config.update({"trainable_token_indices": [3]}),
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
        lambda config, tensors: config.update({"target_modules": ["v_proj"]}),
        Q0.removeprefix("base_model.model."),
        "which target_modules .* does not name",
    ),
    "layer not chosen": (
        lambda config, tensors: config.update({"layers_to_transform": [1]}),
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
        lambda config, tensors: config.update({"r": 4}),
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
    artifact = edited(adapter, tmp_path, lambda config, tensors: config.update({key: value}))
    started = time.monotonic()
    with pytest.raises(ArtifactError, match="too long to match"):
        Lora().load(artifact, info)
    assert time.monotonic() - started < 10


def test_a_broken_pattern_is_refused(adapter: Path, info: BaseInfo, tmp_path: Path) -> None:
    artifact = edited(adapter, tmp_path, lambda config, tensors: config.update({"target_modules": "(q_proj"}))
    with pytest.raises(ArtifactError, match="no regular expression"):
        Lora().load(artifact, info)


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
    served = plain_model(models["phi3"])
    apply_deltas(served, Lora().load(Artifact(tmp_path), base_handle(served).info))
    assert torch.allclose(logits(served), logits(model), atol=1e-4, rtol=0)


def test_scaling_of_each_module(adapter: Path, info: BaseInfo, tmp_path: Path) -> None:
    edit: Any = lambda config, tensors: config.update({"use_rslora": True, "alpha_pattern": {"q_proj": 2}})  # noqa: E731
    deltas: list[LowRank] = list(Lora().load(edited(adapter, tmp_path, edit), info))
    scalings = {delta.module.rpartition(".")[2]: delta.scaling for delta in deltas}
    assert scalings == pytest.approx({"q_proj": 2 / 8**0.5, "v_proj": 16 / 8**0.5})


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of experts."""
    return toys.make_model("mixtral", tmp_path_factory.mktemp("mixture") / "mixtral")


def test_training_on_a_mixture_updates_its_linear_layers(mixture: Path, tmp_path: Path) -> None:
    strategy, model = Lora(), plain_model(mixture).requires_grad_(False)
    handle, config = base_handle(model), LoraConfig.model_validate({"r": 2})
    trainable = strategy.build(handle, config)
    device = DeviceInfo(type="cpu", total_memory_bytes=2**34, threads=1)
    estimate = strategy.estimate(config, handle.info, DatasetInfo(row_count=1, total_tokens=1), device)
    assert sum(parameter.numel() for parameter in trainable.parameters.values()) == estimate.trained_parameters
    artifact = write_artifact(strategy.save(trainable), tmp_path)
    deltas = strategy.load(artifact, handle.info)
    assert {delta.module for delta in deltas} == set(handle.info.linear_modules) - {"lm_head"}


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
    mixture: Path, tmp_path: Path, suffix: str, tensor: torch.Tensor | None, says: str
) -> None:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = PeftLoraConfig(r=2, target_modules=[], target_parameters=parameters, task_type="CAUSAL_LM")
    adapter = toys.make_peft(mixture, tmp_path / "adapter", config)
    name = f"base_model.model.model.layers.1.mlp.experts.{suffix}"

    def edit(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    with pytest.raises(ArtifactError, match=says):
        Lora().load(edited(adapter, tmp_path / "edited", edit), base_handle(plain_model(mixture)).info)


@pytest.mark.parametrize(
    "dtypes", [[torch.bfloat16] * 3, [torch.float16] * 3, [torch.float32, torch.int64, torch.bool]]
)
def test_tensors_are_read_as_they_were_written(tmp_path: Path, dtypes: list[torch.dtype]) -> None:
    """Of one dtype, they are cut out of one mapping."""
    shapes = [(3, 5), (), (2, 1, 4)]
    written = {
        f"{index}": torch.randn(shape).mul(10).to(dtype)
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }
    save_file(written, tmp_path / "x.safetensors", metadata={"a": "b" * 3})
    read = Artifact(tmp_path).tensors("x.safetensors")
    assert set(read) == set(written)
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    save_file({}, tmp_path / "empty.safetensors")
    assert Artifact(tmp_path).tensors("empty.safetensors") == {}
