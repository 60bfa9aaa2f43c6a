"""A version as the host writes it and as the engine serves it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from graftwork_plugins import Artifact, Delta, FullWeights, LowRank, Replace, SavedArtifact, Scale


def write_artifact(saved: SavedArtifact, folder: Path) -> Artifact:
    """Writes what `save` returned as the host does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in saved.tensors.items():
        save_file(dict(tensors), folder / name, metadata=dict(saved.metadata))
    for name, document in saved.documents.items():
        (folder / name).write_text(json.dumps(document, allow_nan=False))
    return Artifact(folder)


@torch.no_grad()
def apply_deltas(model: torch.nn.Module, deltas: Sequence[Delta]) -> None:
    """Changes `model` as the engine would serve it with `deltas`: the reference that engines are compared with.

    For every kind but Prefix, which is no change of modules, and stacked experts.
    """
    # What other deltas compute from the base's weights must not see them replaced.
    for delta in sorted(deltas, key=lambda delta: isinstance(delta, Replace)):
        if isinstance(delta, FullWeights):
            state = model.state_dict()
            for name, tensor in delta.tensors.items():
                state[name].copy_(tensor)
        elif isinstance(delta, LowRank) and delta.parameter is None:
            # Beside the weight, not in it: a tied weight is the embedding too.
            module = model.get_submodule(delta.module)
            module.register_forward_hook(_update_of(delta, module))
        elif isinstance(delta, Scale):
            _scale(model.get_submodule(delta.module), delta)
        elif isinstance(delta, Replace):
            _replace(model.get_submodule(delta.module), delta)
        else:
            raise NotImplementedError(f"the kit does not apply {type(delta).__name__} deltas of this form")


def _update_of(delta: LowRank, module: torch.nn.Module) -> Any:
    a, b = delta.a.float(), delta.b.float()
    factor: torch.Tensor | None = None
    if delta.magnitude is not None:
        weight: Any = module.weight
        matrix = weight.t() if isinstance(module, Conv1D | torch.nn.Embedding) else weight
        factor = delta.magnitude.float() / (matrix.float() + delta.scaling * b @ a).norm(dim=1)

    def add_update(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        is_embedding = isinstance(module, torch.nn.Embedding)
        product = a.t()[inputs[0]] if is_embedding else inputs[0].float() @ a.t()  # [..., rank]
        update = delta.scaling * product @ b.t()
        if is_embedding:
            update = update * getattr(module, "embed_scale", 1.0)
        if delta.bias is not None:
            update = update + delta.scaling * delta.bias.float()
        if factor is None:
            return output + update.to(output.dtype)
        bias = getattr(module, "bias", None)
        bias = 0.0 if bias is None else bias
        return (factor * (output.float() - bias + update) + bias).to(output.dtype)

    return add_update


def _scale(module: torch.nn.Module, delta: Scale) -> None:
    factors = delta.factors.float()
    if delta.of == "input":
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factors.to(inputs[0].dtype),))
    else:
        module.register_forward_hook(lambda module, inputs, output: output * factors.to(output.dtype))


def _replace(module: torch.nn.Module, delta: Replace) -> None:
    for name, tensor in delta.tensors.items():
        old = module._parameters[name]
        assert old is not None, f"{delta.module} has no {name}"
        if delta.copy_of_base:
            assert torch.equal(tensor.to(old), old), f"{delta.module}.{name} is no copy of the base's"
            continue
        new = old.detach().clone()
        new[torch.tensor(delta.rows) if delta.rows is not None else ...] = tensor.to(new)
        # A parameter of its own: a tied one keeps its value elsewhere.
        module._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
