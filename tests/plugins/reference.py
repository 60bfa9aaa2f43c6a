"""What transformers and PEFT answer, what a strategy's deltas answer, and adapters that were edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests import toys
from transformers import AutoModelForCausalLM

from graftwork_plugins import Artifact, Strategy
from graftwork_plugins.testing import apply_deltas, base_handle

Tensors = dict[str, torch.Tensor]
Edit = Callable[[dict[str, Any], Tensors], object]
"""Changes a configuration and tensors in place, or gives other tensors."""


def plain_model(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model as transformers loads it, frozen."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of three prompts, one after another: [tokens, vocabulary]."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in toys.prompts(3)])


def peft_logits(model_dir: Path, adapter: Path) -> torch.Tensor:
    """Logits of the model with the adapter as PEFT loads it."""
    return logits(PeftModel.from_pretrained(plain_model(model_dir), adapter).eval())


def served_logits(strategy: Strategy, model_dir: Path, adapter: Path) -> torch.Tensor:
    """Logits of the model with the adapter's deltas."""
    served = plain_model(model_dir)
    apply_deltas(served, strategy.load(Artifact(adapter), base_handle(served).info))
    return logits(served)


def edited(adapter: Path, folder: Path, edit: Edit) -> Artifact:
    """A copy of an adapter that `edit` has changed."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    given = edit(config, tensors)
    tensors = given if isinstance(given, dict) else tensors
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", "unsloth": "yes"})
    return Artifact(folder)


def keys(**values: Any) -> Edit:
    """Sets keys of the configuration."""
    return lambda config, tensors: config.update(values)
