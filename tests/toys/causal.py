"""Small random causal models by architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 160

COMMON: dict[str, Any] = {
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
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "mistral": MistralConfig(**COMMON, sliding_window=12),
    "gemma3": Gemma3TextConfig(
        **COMMON,
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
    "phi3": Phi3Config(**COMMON),
}

MIXTURES: dict[str, Any] = {
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, decoder_sparse_step=1
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


def move(model: torch.nn.Module, only_trained: bool, seed: int, scale: float = 0.15) -> None:
    """Adds a little to every parameter, so that nothing is what transformers or PEFT start with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only_trained:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of different lengths, 3 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 41, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def make_checkpoint(model_dir: Path, directory: Path, seed: int = 0) -> Path:
    """Saves the model with every weight a little changed, as full tuning would, in `directory`; returns it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    move(model, only_trained=False, seed=seed, scale=0.05)
    model.save_pretrained(directory)
    return directory
