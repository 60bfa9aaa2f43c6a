"""Weights and optimizer state of a run on disk, to go on from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from demo_model.recipe import Recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM


def state_tensors(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state by the name of the parameter that it hangs on."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}:{names[parameter]}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
    }


def save_checkpoint(
    work: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    progress: tuple[int, int, float],
) -> None:
    """The float32 weights, the optimizers' state, and how they came about."""
    step, steps, spent = progress
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    record = {
        "recipe": asdict(recipe),
        "steps_made": step,
        "steps_scheduled": steps,
        "tokens_seen": step * recipe.step_tokens,
        "minutes": round(spent / 60, 1),
    }
    for name, tensors in (("state", state_tensors(model, optimizers)), ("checkpoint", weights)):
        # The record rides along, so that weights and state of different steps are never put together.
        save_file(tensors, work / f"{name}.part", metadata={"record": json.dumps(record)})
        (work / f"{name}.part").replace(work / f"{name}.safetensors")
    (work / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def load_checkpoint(work: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Put the last checkpoint back; return its step and the seconds spent until then."""
    records = []
    for name in ("checkpoint", "state"):
        with safe_open(work / f"{name}.safetensors", "pt") as file:
            records.append(json.loads(file.metadata()["record"]))
    if records[0] != records[1]:
        raise SystemExit("the weights and the optimizer state are of different steps; start again without --resume")
    model.load_state_dict(load_file(work / "checkpoint.safetensors"), strict=False)
    model.tie_weights()
    owners = dict(model.named_parameters())
    for key, tensor in load_file(work / "state.safetensors").items():
        kind, name = key.split(":", 1)
        holder = next(o for o in optimizers if any(owners[name] is p for g in o.param_groups for p in g["params"]))
        holder.state[owners[name]][kind] = tensor
    return records[0]["steps_made"], records[0]["minutes"] * 60
