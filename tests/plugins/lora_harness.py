"""Pieces that the tests of LoRA share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests import toys
from transformers import AutoModelForCausalLM

from graftwork_plugins import Artifact

ARCHITECTURES = ("llama", "gpt2", "phi3")


def plain_model(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in toys.prompts(3)])


def edited(adapter: Path, folder: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> Artifact:
    """A copy of an adapter whose configuration and tensors `edit` has changed in place."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return Artifact(folder)
