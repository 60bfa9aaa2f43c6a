"""Small random models and PEFT adapters, made by the tests that use them."""

from tests.toys.adapters import make_adapter, make_all, make_classifier, make_embedder, make_peft
from tests.toys.causal import COMMON, CONFIGS, MIXTURES, VOCAB, make_checkpoint, make_model, move, prompts
from tests.toys.encoders import ENCODERS, make_encoder, make_text_encoder, pooled
from tests.toys.features import lora_features, other_peft_configs, peft_configs
from tests.toys.text import make_text_model, save_tokenizer

_COMMON = COMMON
"""The name that tests/plugins uses."""

__all__ = [
    "COMMON",
    "CONFIGS",
    "ENCODERS",
    "MIXTURES",
    "VOCAB",
    "lora_features",
    "make_adapter",
    "make_all",
    "make_checkpoint",
    "make_classifier",
    "make_embedder",
    "make_encoder",
    "make_model",
    "make_peft",
    "make_text_encoder",
    "make_text_model",
    "move",
    "other_peft_configs",
    "peft_configs",
    "pooled",
    "prompts",
    "save_tokenizer",
]
