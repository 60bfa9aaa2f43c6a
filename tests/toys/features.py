"""What PEFT can express and is served: configurations by the name of what they show."""

from __future__ import annotations

from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from tests.toys.causal import MIXTURES

_NAMES = {
    "gpt2": {"q": "c_attn", "down": "c_proj", "embedding": "wte", "norm": "ln_f", "mlp": "h.1.mlp"},
    "phi3": {"q": "qkv_proj"},
    "mixtral": {"down": "o_proj"},
    "qwen3_moe": {"down": "o_proj"},
}
_USUAL = {"q": "q_proj", "down": "down_proj", "embedding": "embed_tokens", "norm": "norm", "mlp": "layers.1.mlp"}


def lora_features(architecture: str) -> dict[str, dict[str, Any]]:
    """LoraConfig settings by the name of what they show: what PEFT's LoRA can express."""
    names = _USUAL | _NAMES.get(architecture, {})
    q, down, embedding, norm, mlp = (names[key] for key in ("q", "down", "embedding", "norm", "mlp"))
    tied = {"target_modules": [q, embedding, "lm_head"], "ensure_weight_tying": True}
    if architecture == "gpt2":
        tied = {"target_modules": [q, embedding], "ensure_weight_tying": True}  # PEFT ties no wte, see below
    features: dict[str, dict[str, Any]] = {
        "lora": {},
        "rank 1": {"r": 1, "lora_alpha": 2},
        "rank 512": {"r": 512, "target_modules": [q]},
        "rslora of ranks by pattern": {
            "use_rslora": True,
            "target_modules": [q, down],
            "rank_pattern": {q: 33, rf"\d\..*{down}": 7},
            "alpha_pattern": {rf"1\..*\.{down}": 3, q: 6},
        },
        "some layers": {"target_modules": [q, down], "layers_to_transform": [0, 2]},
        "a regular expression": {"target_modules": rf".*\.[12]\..*({q}|{down})", "exclude_modules": rf".*2\..*{down}"},
        "all biases": {"bias": "all", "target_modules": [q]},
        "biases of adapted": {"bias": "lora_only"},
        "lora_bias": {"lora_bias": True},
        "output layer": {"target_modules": [q, "lm_head"]},
        "norms and output layer": {"modules_to_save": [norm, "lm_head"]},
        "whole embedding": {"modules_to_save": [embedding], "target_modules": [down]},
        "whole embedding, tied": {"modules_to_save": [embedding], "ensure_weight_tying": True},
        "whole mlp": {"modules_to_save": [mlp], "r": 2},
        "tokens": {"trainable_token_indices": [3, 7, 5, 100]},
        "tokens of both": {"trainable_token_indices": {embedding: [3, 9, 80], "lm_head": [4]}},
        "embedding": {"target_modules": [q, embedding], "use_rslora": True},
        "embedding, tied": tied,
        "dora": {"use_dora": True},
        "dora and biases": {"use_dora": True, "bias": "all", "r": 3, "modules_to_save": [norm]},
        "dora of embedding and output": {"use_dora": True, "target_modules": [embedding, "lm_head", down]},
    }
    if architecture not in MIXTURES:
        return features
    # There, PEFT takes "all-linear" for the experts too, which do not go together with biases and DoRA.
    attention = {"target_modules": [q, down]}
    features = {name: settings if name == "lora" else attention | settings for name, settings in features.items()}
    return features | _mixture_features()


def _mixture_features() -> dict[str, dict[str, Any]]:
    experts: dict[str, Any] = {"r": 3, "target_modules": ["q_proj"]}
    return {
        "gates of experts": experts | {"target_parameters": ["mlp.experts.gate_up_proj"]},
        "experts": experts
        | {
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
            "use_rslora": True,
            "rank_pattern": {"gate_up_proj": 2},
            "alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 5},
            "modules_to_save": ["norm"],
        },
        "experts alone": {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]},
        "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    }


def peft_configs(architecture: str) -> dict[str, PeftConfig]:
    """Of everything that is served, by the name of what it shows: lora_features, then other_peft_configs."""
    usual = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = {name: LoraConfig(**usual | settings) for name, settings in lora_features(architecture).items()}
    return lora | other_peft_configs(architecture)


def other_peft_configs(architecture: str) -> dict[str, PeftConfig]:
    """PEFT configurations of other kinds than LoRA that are served, by the name of what they show."""
    names = _USUAL | _NAMES.get(architecture, {})
    ia3 = {"target_modules": [names["q"], names["down"]], "feedforward_modules": [names["down"]]}
    if architecture == "gpt2":
        ia3 = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
    task: Any = {"task_type": "CAUSAL_LM"}
    return {
        "ia3": IA3Config(**task, **ia3),
        "ia3 of the output layer": IA3Config(**task, target_modules=[names["q"], "lm_head"], feedforward_modules=[]),
        "ia3 with a norm": IA3Config(**task, **ia3, modules_to_save=[names["norm"]]),
        "prompt tuning": PromptTuningConfig(**task, num_virtual_tokens=5),
        "a long prompt": PromptTuningConfig(**task, num_virtual_tokens=20),
        "p-tuning": PromptEncoderConfig(**task, num_virtual_tokens=3, encoder_hidden_size=16),
        "prefix tuning": PrefixTuningConfig(**task, num_virtual_tokens=7),
        "projected prefix": PrefixTuningConfig(
            **task, num_virtual_tokens=17, prefix_projection=True, encoder_hidden_size=16
        ),
    }
