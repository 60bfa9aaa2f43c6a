"""What decides the demo base model's weights besides the corpus: its shape, its settings, the order of its batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the corpus."""

    seed: int = 20240607
    steps: int = 2400
    # Each entry is one micro-batch of packed rows that long; all have `micro_tokens` tokens. Short rows are the
    # cheapest, and the long ones teach the positions up to the stated limit.
    contexts: tuple[int, ...] = (1024, 512, 256, 256)
    micro_tokens: int = 1024
    muon_lr: float = 0.015
    adam_lr: float = 0.004
    weight_decay: float = 0.05
    warmup: int = 40
    decay_share: float = 0.6
    clip: float = 1.0
    # Matrix products of the forward and backward pass; weights, gradients and optimizer state stay float32.
    compute: str = "bfloat16"

    @property
    def step_tokens(self) -> int:
        """Tokens that one step learns from."""
        return len(self.contexts) * self.micro_tokens


def make_config() -> LlamaConfig:
    """The model's shape: 5.4 million parameters."""
    settings: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 688,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**settings)


def make_model(recipe: Recipe) -> LlamaForCausalLM:
    """A fresh model; output projections start at zero, so that every layer begins as the identity."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(make_config()).float()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def schedule(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate's factor: warm up, hold, then fall linearly to zero over the last part."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return min(1.0, (steps - step) / max(1.0, recipe.decay_share * steps))


def rows_of(stream: np.ndarray, context: int, count: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of packed rows of one length, in a new seeded order and at a new offset each pass."""
    rng = np.random.default_rng([seed, context])
    width = context + 1
    while True:
        offset = int(rng.integers(0, width))
        rows = (len(stream) - offset) // width
        table = stream[offset : offset + rows * width].reshape(rows, width)
        order = rng.permutation(rows)
        for start in range(0, rows - count + 1, count):
            yield torch.from_numpy(table[order[start : start + count]].astype(np.int64))


def batches(stream: np.ndarray, recipe: Recipe) -> Iterator[list[Tensor]]:
    """Yield each step's micro-batches. Every row length draws from the whole stream by itself."""
    sources = {
        context: rows_of(stream, context, recipe.micro_tokens // context, recipe.seed)
        for context in set(recipe.contexts)
    }
    while True:
        yield [next(sources[context]) for context in recipe.contexts]
