"""A small tokenizer, and a model with one of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.toys.causal import COMMON
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    model = LlamaForCausalLM(LlamaConfig(**(COMMON | {"vocab_size": save_tokenizer(directory)} | config)))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory)
    return directory
