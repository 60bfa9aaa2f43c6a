"""LoRA artifacts: what plain PEFT writes is read exactly, and what is trained here is read by PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from tests import toys
from tests.bounds import assert_near
from tests.plugins.lora_harness import ARCHITECTURES, edited, logits, plain_model

from graftwork_plugins import Artifact, ArtifactError, BaseInfo, DatasetInfo, DeviceInfo, LowRank
from graftwork_plugins.builtin.strategies.lora import Lora, LoraConfig, graftwork_identify_artifact
from graftwork_plugins.testing import apply_deltas, base_handle, make_rows, train_steps, write_artifact

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


CASES = [
    *((architecture, name) for architecture in ARCHITECTURES for name in PATTERNS),
    *(("llama", name) for name in LLAMA_PATTERNS),
]


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


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


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
