"""Small random encoders by architecture."""

from __future__ import annotations

import copy
import string
from pathlib import Path
from typing import Any

import torch
from tests.toys.causal import VOCAB, move
from transformers import (
    AutoModel,
    BertConfig,
    BertTokenizerFast,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

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


def make_encoder(architecture: str, directory: Path, seed: int = 0, kind: Any = AutoModel, **config: Any) -> Path:
    """Saves a random encoder in `directory`; returns it. kind: another Auto class, for a checkpoint with a head."""
    torch.manual_seed(seed)
    settings = copy.deepcopy(ENCODERS[architecture])
    settings.update(config)
    model = kind.from_config(settings)
    move(model, only_trained=False, seed=seed, scale=0.05)
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
