"""Small random models and PEFT adapters, made by the tests that use them."""

from __future__ import annotations

import copy
import string
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizerFast,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

VOCAB = 160

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=16),
    "mistral": MistralConfig(**_COMMON, sliding_window=12),
    "gemma3": Gemma3TextConfig(
        **_COMMON,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=48,
        n_layer=3,
        n_head=6,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    ),
    "phi3": Phi3Config(**_COMMON),
}

MIXTURES: dict[str, Any] = {
    "mixtral": MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **_COMMON, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, decoder_sparse_step=1
    ),
}
"""Architectures with a mixture of experts."""


def make_model(architecture: str, directory: Path, seed: int = 0) -> Path:
    """Saves a random model of an architecture in `directory`; returns it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config((CONFIGS | MIXTURES)[architecture])
    # GPT-2 and others start biases and norms at 0 and 1, which would hide a dropped bias.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory)
    return directory


def make_adapter(model_dir: Path, directory: Path, seed: int = 0, **config: Any) -> Path:
    """Saves a random PEFT LoRA adapter of the model's linear layers in `directory`; returns it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    # For a mixture of experts, PEFT takes "all-linear" to mean the experts' stacked parameters too.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if model.config.model_type in MIXTURES else "all-linear"
    settings = {"r": 8, "lora_alpha": 16, "target_modules": targets, "task_type": "CAUSAL_LM"} | config
    peft_model = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft_model.save_pretrained(directory)
    return directory


def make_peft(model_dir: Path, directory: Path, config: PeftConfig, seed: int = 0) -> Path:
    """Saves a PEFT adapter of the model, every trained parameter moved a little, in `directory`; returns it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of each tied weight
        peft_model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        peft_model.save_pretrained(directory)
    return directory


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


def make_all(model_dir: Path, directory: Path, configs: Mapping[str, PeftConfig]) -> dict[str, Path]:
    """An adapter of each configuration, with weights of its own, in folders of `directory`; by the same names."""
    directory.mkdir(parents=True, exist_ok=True)
    return {
        name: make_peft(model_dir, directory / str(seed), config, seed=seed)
        for seed, (name, config) in enumerate(configs.items())
    }


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


_ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}

ENCODERS: dict[str, Any] = {
    "bert": BertConfig(**_ENCODER),
    "roberta": RobertaConfig(**_ENCODER | {"pad_token_id": 1}, bos_token_id=0),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB,
        dim=48,
        hidden_dim=80,
        n_layers=3,
        n_heads=6,
        max_position_embeddings=64,
        initializer_range=0.2,
    ),
    "xlm-roberta": XLMRobertaConfig(**_ENCODER | {"pad_token_id": 1}, bos_token_id=0),
    "camembert": CamembertConfig(**_ENCODER | {"pad_token_id": 1}, bos_token_id=0),
    "modernbert": ModernBertConfig(
        **_ENCODER,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        local_attention=8,
        global_attn_every_n_layers=2,
    ),
    "electra": ElectraConfig(**_ENCODER, embedding_size=32),
}


def _move(model: torch.nn.Module, only_trained: bool, seed: int, scale: float = 0.15) -> None:
    """Adds a little to every parameter, so that nothing is what transformers or PEFT start with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only_trained:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def make_encoder(architecture: str, directory: Path, seed: int = 0, kind: Any = AutoModel, **config: Any) -> Path:
    """Saves a random encoder in `directory`; returns it. kind: another Auto class, for a checkpoint with a head."""
    torch.manual_seed(seed)
    settings = copy.deepcopy(ENCODERS[architecture])
    settings.update(config)
    model = kind.from_config(settings)
    _move(model, only_trained=False, seed=seed, scale=0.05)
    model.save_pretrained(directory)
    return directory


def make_text_encoder(directory: Path, seed: int = 0, kind: Any = AutoModel, **config: Any) -> Path:
    """Saves a random BERT with a WordPiece tokenizer of its own in `directory`; returns it."""
    words = ["the", "quick", "brown", "fox", "over", "lazy", "dog", "one", "two", "three", "four", "five"]
    pieces = [f"##{letter}" for letter in string.ascii_lowercase] + list(string.ascii_lowercase)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *pieces]
    tokenizer = BertTokenizerFast(vocab={token: index for index, token in enumerate(vocabulary)})
    make_encoder("bert", directory, seed, kind, vocab_size=len(vocabulary), **config)
    tokenizer.save_pretrained(directory)
    return directory


def make_classifier(model_dir: Path, directory: Path, labels: int = 3, seed: int = 0, **config: Any) -> Path:
    """Saves a random PEFT adapter of task_type SEQ_CLS for the model, its head with it, in `directory`; returns it."""
    return _make_other_task(AutoModelForSequenceClassification, model_dir, directory, labels, seed, "SEQ_CLS", config)


def make_embedder(model_dir: Path, directory: Path, seed: int = 0, **config: Any) -> Path:
    """Saves a random PEFT adapter of task_type FEATURE_EXTRACTION for the model in `directory`; returns it."""
    return _make_other_task(AutoModel, model_dir, directory, 2, seed, "FEATURE_EXTRACTION", config)


def _make_other_task(
    kind: Any, model_dir: Path, directory: Path, labels: int, seed: int, task: str, config: dict[str, Any]
) -> Path:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(model_dir, dtype=torch.float32, num_labels=labels, ignore_mismatched_sizes=True)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task} | config
        peft_model = get_peft_model(model, LoraConfig(**copy.deepcopy(settings)))  # PEFT adds to modules_to_save
        _move(peft_model, only_trained=True, seed=seed)
        peft_model.save_pretrained(directory)
    return directory


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of different lengths, 3 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 41, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(directory: Path) -> int:
    """Saves a small byte-level BPE tokenizer with a chat template in `directory`; returns its vocabulary size.

    <pad>, <s> and </s> are 0, 1 and 2, as the models here have them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog; one two three four five"] * 20, trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(directory)
    return len(fast)


def make_text_model(directory: Path, seed: int = 0, **config: Any) -> Path:
    """Saves a random Llama with a tokenizer of its own in `directory`; returns it. `config` goes to LlamaConfig."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(_COMMON | {"vocab_size": save_tokenizer(directory)} | config)))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory)
    return directory


def make_checkpoint(model_dir: Path, directory: Path, seed: int = 0) -> Path:
    """Saves the model with every weight a little changed, as full tuning would, in `directory`; returns it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(directory)
    return directory


def pooled(states: torch.Tensor, pooling: str) -> torch.Tensor:
    """The vector of hidden states [tokens, hidden] as sentence-transformers' Pooling makes it; poolings joined by "+"
    one after another."""
    weights = torch.arange(1.0, len(states) + 1)[:, None]
    made = {
        "cls": states[0],
        "max": states.max(0).values,
        "mean": states.mean(0),
        "mean_sqrt_len": states.sum(0) / len(states) ** 0.5,
        "weightedmean": (states * weights).sum(0) / weights.sum(),
        "last": states[-1],
    }
    return torch.cat([made[one] for one in pooling.split("+")])
