"""Random-weight models of real shapes and PEFT adapters for them, made once in a work folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "7m": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
    },
}

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(shape: str, folder: Path) -> Path:
    """Directory of the model of `shape` (bf16 weights, seed 0), made if it is not there."""
    directory = folder / shape
    if not (directory / "model.safetensors").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def make_adapters(model_dir: Path, count: int, rank: int = 16) -> list[Path]:
    """`count` adapters of rank `rank` on all linear layers (bf16, random A and B), made if they are not there."""
    directories = [model_dir.parent / f"{model_dir.name}-adapters" / f"r{rank}-{index}" for index in range(count)]
    if all((directory / "adapter_model.safetensors").is_file() for directory in directories):
        return directories
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    peft_model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    for index, directory in enumerate(directories):
        generator = torch.Generator().manual_seed(index)
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.02).to(torch.bfloat16)
        peft_model.save_pretrained(directory)
    return directories
