"""Files as other tools write them: what PEFT and transformers load is loaded, with their answers; a key or tensor that
may change the mathematics and is not served is refused by its name."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from tests import toys
from tests.plugins.reference import Edit, Tensors, edited, keys, logits, peft_logits, plain_model, served_logits
from transformers import AutoConfig, AutoModelForCausalLM

from graftwork_plugins import Artifact, ArtifactError, BaseInfo, Strategy
from graftwork_plugins.builtin.strategies.full import FullTuning
from graftwork_plugins.builtin.strategies.ia3 import Ia3
from graftwork_plugins.builtin.strategies.lora import Lora
from graftwork_plugins.builtin.strategies.prefix import PrefixStrategy
from graftwork_plugins.testing import apply_deltas, base_handle

PREFIX = "base_model.model."
LAYER = f"{PREFIX}model.layers.0.self_attn"


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind that is read."""
    usual: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    dora = PeftLoraConfig(**usual, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    configs = {"lora": PeftLoraConfig(**usual, target_modules=["q_proj", "v_proj"]), "dora": dora}
    others = toys.other_peft_configs("llama")
    return toys.make_all(
        llama, tmp_path_factory.mktemp("adapters"), configs | {k: others[k] for k in ("ia3", "p-tuning")}
    )


def names(change: Callable[[str], str]) -> Edit:
    return lambda config, tensors: {change(name): tensor for name, tensor in tensors.items()}


def more(**tensors: torch.Tensor) -> Edit:
    """Tensors with "__" for "." in their names."""
    return lambda config, own: own | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def only_needed(config: dict[str, Any], tensors: Tensors) -> None:
    for key in config.keys() - {"peft_type", "r", "lora_alpha", "target_modules"}:
        del config[key]


UNSLOTH = {
    "base_model_class": "LlamaForCausalLM",
    "parent_library": "transformers.models.llama.modeling_llama",
    "unsloth_fixed": True,
}
LORA_FILES: dict[str, Edit] = {
    "only what is needed": only_needed,
    "unsloth": keys(auto_mapping=UNSLOTH, unsloth_version="2026.3.1", unsloth_fixed=True, task_type=None),
    "a model's own code": keys(auto_mapping={"base_model_class": "X", "parent_library": "transformers_modules.org.x"}),
    "a class of a script": keys(auto_mapping={"base_model_class": "X", "parent_library": "__main__", "tool": "v1.2"}),
    "swift": keys(lora_dtype="bf16", lorap_lr_ratio=16.0, lorap_emb_lr=1e-6, model_id_or_path=None),
    "a card's facts": keys(tags=["x"], license="mit", library_name="peft", language=["en"], datasets=["a/b"]),
    "private": keys(_name_or_path="/data/x", _comment={"by": "me"}, transformers_version="5.1", torch_dtype="bfloat16"),
    "how it was trained": keys(learning_rate=1e-4, num_train_epochs=3, seed=1, max_seq_length=2048, router_lr=0.1),
    "loftq is done": keys(loftq_config={"loftq_bits": 4, "loftq_iter": 1}, init_lora_weights=True),
    "corda is done": keys(corda_config={"cache_file": None, "corda_method": "ipm"}),
    "lora-ga is done": keys(lora_ga_config={"direction": "ArB2r"}, init_lora_weights=False),
    "eva": keys(eva_config={"rho": 2.0}, init_lora_weights="eva"),
    "mica": keys(init_lora_weights="mica"),
    "qalora's detail": keys(qalora_group_size=32, use_qalora=False),
    "velora": keys(velora_config={"num_groups": 2}),
    "how it is run": keys(runtime_config={"ephemeral_gpu_offload": True}, inference_mode=False),
    "nothing": keys(runtime_config=None, loftq_config=None, peft_version=None, use_dora=None, a_future_key=None),
    "not used": keys(layer_replication=None, a_future_key=False, another=[], a_third="", use_rslora=None),
    "fan_in_fan_out": keys(fan_in_fan_out=True),
    "names as in the model": names(lambda name: name.replace(".weight", ".default.weight")),
    "bfloat16": lambda config, tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()},
    "float16": lambda config, tensors: {name: tensor.half() for name, tensor in tensors.items()},
    "float64": lambda config, tensors: {name: tensor.double() for name, tensor in tensors.items()},
    "dtypes": lambda config, own: {name: t.half() if ".lora_A." in name else t.double() for name, t in own.items()},
    "frequencies": more(**{f"{LAYER}.rotary_emb.inv_freq".replace(".", "__"): torch.ones(4)}),
    "tables": more(
        **{
            f"{LAYER}.rotary_emb.{table}".replace(".", "__"): torch.ones(1, 1, 9, 8)
            for table in ("cos_cached", "sin_cached")
        }
    ),
    "masks": more(
        **{
            f"{LAYER}.bias".replace(".", "__"): torch.ones(1, 1, 9, 9, dtype=torch.bool),
            f"{LAYER}.masked_bias".replace(".", "__"): torch.tensor(-1e9),
        }
    ),
}


def assert_as_peft(strategy: Strategy, llama: Path, artifact: Artifact) -> None:
    """What the file changes is what PEFT makes of it, and it does change something."""
    answers = served_logits(strategy, llama, artifact.path)
    torch.testing.assert_close(answers, peft_logits(llama, artifact.path), atol=1e-4, rtol=0)
    assert (answers - logits(plain_model(llama))).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")  # PEFT warns of keys that it does not know
@pytest.mark.parametrize("case", LORA_FILES)
def test_lora(llama: Path, adapters: dict[str, Path], tmp_path: Path, case: str) -> None:
    assert_as_peft(Lora(), llama, edited(adapters["lora"], tmp_path, LORA_FILES[case]))


def test_every_name_as_it_is_in_a_model(llama: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def in_model(name: str) -> str:
        part = re.search(
            r"(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)(\.weight)?$", name
        )
        if part is None:
            return name
        leaf = ".weight" if part[2] or part[1] == "lora_magnitude_vector" else ""
        return f"{name[: part.start()]}{part[1]}.default{leaf}"

    assert_as_peft(Lora(), llama, edited(adapters["dora"], tmp_path / "dora", names(in_model)))
    assert_as_peft(Ia3(), llama, edited(adapters["ia3"], tmp_path / "ia3", names(in_model)))
    twice = edited(
        adapters["lora"],
        tmp_path / "twice",
        lambda config, own: own | {in_model(name): own[name].clone() for name in own},
    )
    with pytest.raises(ArtifactError, match="twice"):
        Lora().load(twice, base_handle(plain_model(llama)).info)


DESCRIBED = keys(auto_mapping=UNSLOTH, unsloth_version="1", _comment="x", tags=["a"], torch_dtype="float32", new=None)


@pytest.mark.filterwarnings("ignore")
def test_the_rule_is_the_same_for_every_kind(
    llama: Path, info: BaseInfo, adapters: dict[str, Path], tmp_path: Path
) -> None:
    assert_as_peft(Ia3(), llama, edited(adapters["ia3"], tmp_path / "ia3", DESCRIBED))
    described = edited(adapters["p-tuning"], tmp_path / "prefix", DESCRIBED)
    (ours,), (plain,) = (
        PrefixStrategy().load(artifact, info) for artifact in (described, Artifact(adapters["p-tuning"]))
    )
    assert ours.embeddings is not None
    assert plain.embeddings is not None
    assert torch.equal(ours.embeddings, plain.embeddings)
    for name, strategy in {"lora": Lora(), "ia3": Ia3(), "p-tuning": PrefixStrategy()}.items():
        for key, value in {"gate_scaling": 2.0, "auto_mapping": {"parent_library": "os.path"}}.items():
            artifact = edited(adapters[name], tmp_path / f"{name}-{key}", keys(**{key: value}))
            with pytest.raises(ArtifactError, match="accepted") as caught:
                strategy.load(artifact, info)
            assert caught.value.key == key
            assert key in caught.value.message


REFUSED = {
    "a_key_of_the_future": "on",
    "scaling_by_layer": {"0": 2.0},
    "use_new_thing": True,
    "enable_lora": [True, False, True],
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [1, 2],
    "kasa_config": {},
    "arrow_config": {"top_k": 1},
    "monteclora_config": {"num_samples": 2},
    "megatron_config": {"a": 1},
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
    "init_lora_weights": "pissa_niter_4",
    "auto_mapping": ["transformers"],
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_may_change_the_mathematics_is_refused_by_name(
    info: BaseInfo, adapters: dict[str, Path], tmp_path: Path, key: str
) -> None:
    artifact = edited(adapters["lora"], tmp_path, keys(**{key: REFUSED[key]}))
    with pytest.raises(ArtifactError, match="accepted") as caught:
        Lora().load(artifact, info)
    assert caught.value.key == key
    assert key in caught.value.message


def test_nothing_is_imported_that_a_file_names(info: BaseInfo, adapters: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "canary_of_a_file.py").write_text("raise SystemExit('imported')")
    mapping = {"base_model_class": "X", "parent_library": "canary_of_a_file", "unsloth_fixed": True}
    artifact = edited(adapters["lora"], tmp_path / "adapter", keys(auto_mapping=mapping))
    sys.path.insert(0, str(tmp_path))
    try:
        Lora().load(artifact, info)
    finally:
        sys.path.remove(str(tmp_path))
    assert "canary_of_a_file" not in sys.modules


def test_a_bias_that_is_trained_is_no_mask(info: BaseInfo, adapters: dict[str, Path], tmp_path: Path) -> None:
    name = f"{LAYER}.bias"
    artifact = edited(adapters["lora"], tmp_path, more(**{name.replace(".", "__"): torch.ones(48)}))
    with pytest.raises(ArtifactError) as caught:
        Lora().load(artifact, info)
    assert caught.value.key == name


# ---------------------------------------------------------------------------------------------- whole checkpoints

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn by the limit": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_a_raised_limit_is_accepted_where_nothing_is_derived_from_it(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **toys._COMMON, rope_parameters=dict(ROPES[case]))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base = plain_model(tmp_path / "base")
    tuned = toys.make_checkpoint(tmp_path / "base", tmp_path / "tuned")
    document = json.loads((tuned / "config.json").read_text()) | {"max_position_embeddings": 1024}
    if case == "yarn by the limit":
        document["rope_parameters"].pop("original_max_position_embeddings")
    (tuned / "config.json").write_text(json.dumps(document))
    info = base_handle(base).info
    if case in ("dynamic", "yarn by the limit"):
        with pytest.raises(ArtifactError) as caught:
            FullTuning().load(Artifact(tuned), info)
        assert caught.value.key in ("max_position_embeddings", "rope_parameters")
        return
    expected = logits(plain_model(tuned))
    apply_deltas(base, FullTuning().load(Artifact(tuned), info))
    torch.testing.assert_close(logits(base), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "bfloat16", "dtype": None, "unsloth_version": "2026.3", "unsloth_fixed": True},
        {"architectures": ["FSDPLlamaForCausalLM"], "use_cache": False, "attention_dropout": 0.1},
        {"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None},
        {"head_dim": None, "num_labels": 10**12, "id2label": {"0": "A"}, "problem_type": "regression"},
        {"pretraining_tp": 2, "auto_map": {"AutoModel": "x.Y"}, "tokenizer_class": "X", "quantization_config": None},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_configuration_that_describes_otherwise_is_accepted(
    llama: Path, info: BaseInfo, tmp_path: Path, changes: dict[str, Any]
) -> None:
    tuned = toys.make_checkpoint(llama, tmp_path)
    document = json.loads((tuned / "config.json").read_text()) | changes
    (tuned / "config.json").write_text(
        json.dumps({k: v for k, v in document.items() if v is not None or k == "head_dim"})
    )
    FullTuning().load(Artifact(tuned), info)


def test_what_is_not_said_is_what_the_class_takes(llama: Path, tmp_path: Path) -> None:
    """Qwen2's configuration has a window that another key switches off; Llama's epsilon has a default."""
    tuned = toys.make_checkpoint(toys.make_model("qwen2", tmp_path / "qwen2"), tmp_path / "tuned")
    document = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(document | {"sliding_window": 64, "use_sliding_window": False}))
    FullTuning().load(Artifact(tuned), base_handle(plain_model(tmp_path / "qwen2")).info)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **toys._COMMON, rms_norm_eps=1e-2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    info = base_handle(plain_model(tmp_path / "base")).info
    for key, document in {
        "rms_norm_eps": {"rms_norm_eps": None},
        "rope_parameters": {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "num_hidden_layers": {"num_hidden_layers": 10**9},
        "hidden_size": {"hidden_size": "many"},
    }.items():
        merged = json.loads((tmp_path / "base" / "config.json").read_text()) | document
        shutil.copytree(tmp_path / "base", tmp_path / key)
        (tmp_path / key / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
        with pytest.raises(ArtifactError, match=key) as caught:
            FullTuning().load(Artifact(tmp_path / key), info)
        assert caught.value.key == key
