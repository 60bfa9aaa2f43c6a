"""Random-weight models of real shapes and PEFT adapters for them, made once in a work folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from graftwork_server.config import DEMO_MODEL

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
    """Directory of the model of `shape` (bf16 weights, seed 0) with a tokenizer, made if it is not there."""
    directory = folder / shape
    if not (directory / "tokenizer.json").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(directory)
        _write_tokenizer(directory, config.vocab_size)
    return directory


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """The tokenizer of the model on board with as many tokens as the model has: random weights answer with any."""
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    vocab |= {f"unused{id}": id for id in range(len(vocab), vocab_size)}
    (directory / "tokenizer_config.json").write_text((DEMO_MODEL / "tokenizer_config.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def make_adapters(model_dir: Path, names: Iterable[str]) -> list[Path]:
    """Adapters on all linear layers (bf16, random A and B) in directories of these names, made if they are not there.

    A name such as r16-3 says the rank and the number, which is the seed.
    """
    directories = [model_dir.parent / f"{model_dir.name}-adapters" / name for name in names]
    missing = [path for path in directories if not (path / "adapter_model.safetensors").is_file()]
    for rank in sorted({_rank_and_seed(path)[0] for path in missing}):
        model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        peft_model = get_peft_model(model, config)
        for path in missing:
            if _rank_and_seed(path)[0] == rank:
                _randomise(peft_model, _rank_and_seed(path)[1])
                peft_model.save_pretrained(path)
    return directories


def small_adapter(like: Path, directory: Path, seed: int) -> Path:
    """An adapter of rank 1 on the query projections alone, cut from `like`, its weights scaled by its own factor."""
    directory.mkdir()
    config = json.loads((like / "adapter_config.json").read_text())
    config |= {"r": 1, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        name: (tensor[:1] if "lora_A" in name else tensor[:, :1]) * (1 + seed / 1024)
        for name, tensor in load_file(like / "adapter_model.safetensors").items()
        if ".q_proj." in name
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def _rank_and_seed(path: Path) -> tuple[int, int]:
    rank, seed = path.name.removeprefix("r").split("-")
    return int(rank), int(seed)


def _randomise(peft_model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.02).to(torch.bfloat16)
