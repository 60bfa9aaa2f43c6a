"""From deltas to row changes: everything of an adapter that is no plain low-rank product on a linear layer."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from graftwork_plugins import LowRank, Replace, Scale
from graftwork_server.base.quantization import QuantizedLinear
from graftwork_server.layers.binding.checks import _check_tensors_and_scaling, check_low_rank, check_values, rejected
from graftwork_server.layers.changes import (
    Affine,
    EmbeddingUpdate,
    ExpertsUpdate,
    OtherEmbeddings,
    OtherOutputs,
    OtherWeights,
    RowChange,
    ScaledInput,
)
from graftwork_server.layers.fused_modules import unwrapped
from graftwork_server.layers.linear import AdaptedLinear
from graftwork_server.layers.models.base_model import BaseModel

ModuleDelta = LowRank | Scale | Replace


@dataclass
class _ModuleDeltas:
    """What an adapter brings for one module."""

    low_rank: LowRank | None = None
    of_parameters: dict[str, LowRank] = field(default_factory=dict)
    """Low-rank updates of stacked parameters."""
    scale: Scale | None = None
    replace: Replace | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of `replace`, those that are not equal to the base's."""

    def add(self, delta: ModuleDelta) -> None:
        if isinstance(delta, LowRank) and delta.parameter is not None:
            if delta.parameter in self.of_parameters:
                raise rejected(delta.module, f"two deltas for {delta.module}.{delta.parameter}")
            self.of_parameters[delta.parameter] = delta
            return
        slot = "low_rank" if isinstance(delta, LowRank) else "scale" if isinstance(delta, Scale) else "replace"
        if getattr(self, slot) is not None:
            raise rejected(delta.module, f"two deltas of the kind {type(delta).__name__} for {delta.module}")
        setattr(self, slot, delta)


def bind_changes(base: BaseModel, deltas: Sequence[ModuleDelta]) -> dict[str, list[RowChange]]:
    """Row changes by module for `deltas`, of which the plain products of low-rank ones on linear layers are left out
    (the slots hold them). Raises FailedPrecondition naming what does not fit."""
    by_module: dict[str, _ModuleDeltas] = defaultdict(_ModuleDeltas)
    for delta in deltas:
        if isinstance(delta, Replace) and delta.copy_of_base:
            _check_copy(base, delta)
        else:
            by_module[delta.module].add(delta)
    changes = {}
    for name, of_module in by_module.items():
        made = _changes_of(base, name, of_module)
        if made:
            changes[name] = made
    return changes


def _changes_of(base: BaseModel, name: str, deltas: _ModuleDeltas) -> list[RowChange]:
    module = _module(base, name)
    layer = unwrapped(module)
    if deltas.replace is not None:
        deltas.tensors = _checked_tensors(base, deltas.replace, _plain(layer))
    weight_is_replaced = "weight" in deltas.tensors
    if weight_is_replaced and (deltas.low_rank is not None or deltas.scale is not None):
        other = "a low-rank update" if deltas.low_rank is not None else "a scale"
        raise rejected(name, f"{name} has both {other} and a weight of its own; one of them is accepted")
    if deltas.of_parameters:
        return _experts_changes(base, name, layer, deltas)
    if isinstance(layer, torch.nn.Embedding):
        return _embedding_changes(base, name, layer, deltas)
    if isinstance(module, AdaptedLinear):
        return _linear_changes(base, name, module, deltas)
    if deltas.low_rank is not None or deltas.scale is not None:
        raise rejected(name, f"{name} is a {type(layer).__name__}; linear layers and embeddings can be updated")
    return [_other_weights(base, layer, deltas.tensors)] if deltas.tensors else []


def _module(base: BaseModel, name: str) -> torch.nn.Module:
    changeable = base.engine_model.changeable
    if name in changeable:
        return changeable[name].module
    try:
        module = base.engine_model.model.get_submodule(name)
    except AttributeError:
        kinds = sorted({known.rpartition(".")[2] for known in changeable})
        raise rejected(name, f"the base has no module {name}; its modules end in {', '.join(kinds)}") from None
    raise rejected(
        name,
        f"{name} is a {type(module).__name__}, which cannot be changed for some rows alone; linear layers, embeddings "
        "and norms can",
    )


def _linear_changes(base: BaseModel, name: str, module: AdaptedLinear, deltas: _ModuleDeltas) -> list[RowChange]:
    layer = module.base
    assert isinstance(layer, torch.nn.Linear | Conv1D)
    replace, low_rank, scale = deltas.replace, deltas.low_rank, deltas.scale
    if low_rank is not None:
        check_low_rank(low_rank, module.in_features, module.out_features, values=False)
    if "weight" in deltas.tensors:
        if replace is not None and replace.rows is not None:
            outputs = _indices(base, replace, module.out_features)
            weight = deltas.tensors["weight"].to(base.device, base.dtype)
            return [OtherOutputs(outputs, weight, None if layer.bias is None else layer.bias[outputs])]
        return [_other_weights(base, _plain(layer), deltas.tensors)]
    if scale is not None and scale.of == "input":
        if low_rank is not None or deltas.tensors:
            raise rejected(name, f"{name} has a scaled input and another delta; one of them is accepted")
        return [ScaledInput(layer, _vector(base, name, "factors", scale.factors, module.in_features))]
    if (
        low_rank is not None
        and low_rank.bias is None
        and low_rank.magnitude is None
        and replace is None
        and scale is None
    ):
        return []  # the usual case, by the hundred
    affine = _affine(base, name, module, deltas)
    return [affine] if affine.factor is not None or affine.offset is not None else []


def _affine(base: BaseModel, name: str, module: AdaptedLinear, deltas: _ModuleDeltas) -> Affine:
    """What becomes of y = W x + bias + scaling * B A x, in float32 until the end."""
    low_rank, out_features = deltas.low_rank, module.out_features
    factor: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    bias = None if module.bias is None else module.bias.float()
    if low_rank is not None and low_rank.bias is not None:
        offset = low_rank.scaling * _vector(base, name, "bias", low_rank.bias, out_features).float()
    if low_rank is not None and low_rank.magnitude is not None:
        magnitude = _vector(base, name, "magnitude", low_rank.magnitude, out_features).float()
        factor = magnitude / _norms(_weight_matrix(module.base), low_rank)
        offset = None if offset is None else factor * offset
        if bias is not None:  # it is in y already, and is not scaled
            offset = (1 - factor) * bias + (0 if offset is None else offset)
    if "bias" in deltas.tensors:
        assert bias is not None  # _checked_tensors saw the base's
        other = deltas.tensors["bias"].to(base.device).float() - bias
        offset = other if offset is None else offset + other
    if deltas.scale is not None:
        factors = _vector(base, name, "factors", deltas.scale.factors, out_features).float()
        factor = factors if factor is None else factor * factors
        offset = None if offset is None else offset * factors
    return Affine(None if factor is None else factor.to(base.dtype), None if offset is None else offset.to(base.dtype))


def _plain(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer, or the one that a quantised layer stands for."""
    return layer.plain() if isinstance(layer, QuantizedLinear) else layer


def _weight_matrix(layer: torch.nn.Module) -> torch.Tensor:
    """[out_features, in_features] float32; what a quantised layer multiplies with."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantized(torch.float32)
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return (weight.t() if isinstance(layer, Conv1D | torch.nn.Embedding) else weight).float()


def _norms(weight: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
    """Norms of the rows of W + scaling * B A, [out_features]."""
    a, b = low_rank.a.to(weight.device).float(), low_rank.b.to(weight.device).float()
    return torch.linalg.vector_norm(torch.addmm(weight, b, a, alpha=low_rank.scaling), dim=1)


def _embedding_changes(base: BaseModel, name: str, layer: torch.nn.Embedding, deltas: _ModuleDeltas) -> list[RowChange]:
    if deltas.scale is not None:
        raise rejected(name, f"{name} is an embedding; the scale of linear layers is accepted")
    # Gemma multiplies what it looks up.
    multiplier = getattr(layer, "embed_scale", None)
    multiplier = 1.0 if multiplier is None else float(multiplier)
    if deltas.tensors:
        replace = deltas.replace
        if replace is None or replace.rows is None:
            return [_other_weights(base, layer, deltas.tensors)]
        tokens = _indices(base, replace, layer.num_embeddings)
        order = tokens.argsort()
        embeddings = deltas.tensors["weight"].to(base.device).float()[order] * multiplier
        return [OtherEmbeddings(tokens[order], embeddings.to(base.dtype))]
    low_rank = deltas.low_rank
    if low_rank is None:
        return []
    check_low_rank(low_rank, layer.num_embeddings, layer.embedding_dim)
    if low_rank.bias is not None:
        raise rejected(name, f"{name} is an embedding; a bias of linear layers is accepted")
    a = low_rank.a.to(base.device).float().t().contiguous()  # [embeddings, rank]
    b = low_rank.b.to(base.device).float().t() * (low_rank.scaling * multiplier)  # [rank, size]
    if low_rank.magnitude is None:
        return [EmbeddingUpdate(a.to(base.dtype), b.to(base.dtype).contiguous())]
    magnitude = _vector(base, name, "magnitude", low_rank.magnitude, layer.embedding_dim).float()
    factor = magnitude / _norms(_weight_matrix(layer), low_rank)
    update = EmbeddingUpdate(a.to(base.dtype), (b * factor).to(base.dtype).contiguous())
    return [Affine(factor.to(base.dtype), None), update]


def _experts_changes(base: BaseModel, name: str, layer: Any, deltas: _ModuleDeltas) -> list[RowChange]:
    if all(delta.a.dim() == 2 for delta in deltas.of_parameters.values()):
        return [_merged(base, name, layer, deltas)]
    stacks = {key: value for key, value in layer._parameters.items() if value is not None}
    is_usual = not any(
        getattr(layer, flag, False) for flag in ("is_transposed", "has_bias", "has_post_expert_norm")
    ) and getattr(layer, "has_gate", False)
    if set(stacks) != {"gate_up_proj", "down_proj"} or not is_usual:
        raise rejected(
            name,
            f"{name} is a {type(layer).__name__}; updated can be experts with gate_up_proj and down_proj alone, "
            "[experts, out, in], without biases",
        )
    if deltas.low_rank is not None or deltas.scale is not None or deltas.tensors:
        raise rejected(name, f"{name} has updates of its experts and another delta; one of them is accepted")
    updates = {}
    for parameter, delta in deltas.of_parameters.items():
        if parameter not in stacks:
            raise rejected(name, f"{name} has no parameter {parameter}; it has {', '.join(stacks)}")
        experts, out_features, in_features = stacks[parameter].shape
        rank = delta.a.shape[1] if delta.a.dim() == 3 else 0
        wanted = ([experts, rank, in_features], [experts, out_features, rank])
        if not rank or (list(delta.a.shape), list(delta.b.shape)) != wanted:
            raise rejected(
                name,
                f"{name}.{parameter}: A is {list(delta.a.shape)} and B is {list(delta.b.shape)}; this base takes "
                f"[{experts}, rank, {in_features}] and [{experts}, {out_features}, rank]",
            )
        if delta.bias is not None or delta.magnitude is not None:
            raise rejected(name, f"{name}.{parameter} has a bias or a magnitude; plain updates of experts are accepted")
        _check_tensors_and_scaling(delta)
        a, b = delta.a.to(base.device, base.dtype), delta.b.to(base.device).float() * delta.scaling
        updates[parameter] = (a, b.to(base.dtype))
    return [ExpertsUpdate(layer, updates)]


def _merged(base: BaseModel, name: str, layer: Any, deltas: _ModuleDeltas) -> OtherWeights:
    """A router is small: it gets weights of its own, the update added."""
    tensors = dict(deltas.tensors)
    for parameter, delta in deltas.of_parameters.items():
        resident = layer._parameters.get(parameter)
        if resident is None or resident.dim() != 2 or parameter in tensors:
            raise rejected(name, f"{name} has no matrix {parameter} that an update could be added to")
        check_low_rank(delta, resident.shape[1], resident.shape[0])
        a, b = delta.a.to(base.device).float(), delta.b.to(base.device).float()
        tensors[parameter] = torch.addmm(resident.float(), b, a, alpha=delta.scaling)
    return _other_weights(base, layer, tensors)


def _other_weights(base: BaseModel, layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> OtherWeights:
    """A copy of the module that shares everything with it but `tensors`."""
    twin = copy.copy(layer)
    own = {
        name: torch.nn.Parameter(tensor.to(base.device, base.dtype).contiguous(), requires_grad=False)
        for name, tensor in tensors.items()
    }
    twin._parameters = {**layer._parameters, **own}
    return OtherWeights(twin, sum(parameter.nbytes for parameter in own.values()))


def _checked_tensors(base: BaseModel, delta: Replace, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that differ from the base's, each shown to fit."""
    differing = {}
    for name, tensor in delta.tensors.items():
        full_name = f"{delta.module}.{name}"
        resident = layer._parameters.get(name)
        if resident is None:
            known = ", ".join(key for key, value in layer._parameters.items() if value is not None)
            raise rejected(full_name, f"the base's {delta.module} has no {name}; it has {known or 'no parameters'}")
        wanted = list(resident.shape)
        if delta.rows is not None:
            if name != "weight" or isinstance(layer, Conv1D):
                raise rejected(full_name, f"rows of {full_name} cannot be replaced; rows of a weight can")
            wanted[0] = len(delta.rows)
        if list(tensor.shape) != wanted:
            raise rejected(full_name, f"{full_name} is {list(tensor.shape)}; this base takes {wanted}")
        check_values(full_name, tensor)
        if delta.rows is not None or not torch.equal(tensor.to(resident.device, resident.dtype), resident):
            differing[name] = tensor
    return differing


def _check_copy(base: BaseModel, delta: Replace) -> None:
    module = _module(base, delta.module)
    differing = _checked_tensors(base, delta, unwrapped(module))
    if differing:
        name = f"{delta.module}.{next(iter(differing))}"
        raise rejected(
            name,
            f"{name} differs from this base's: the adapter was made for another base, or its embeddings were changed. "
            "Accepted are copies of this base's own, or adapters saved with save_embedding_layers=False, or with that "
            "module in modules_to_save",
        )


def _vector(base: BaseModel, module: str, what: str, tensor: torch.Tensor, size: int) -> torch.Tensor:
    if tuple(tensor.shape) != (size,):
        raise rejected(module, f"{module}: {what} is {list(tensor.shape)}; this base takes [{size}]")
    check_values(f"{module}: {what}", tensor, module)
    return tensor.to(base.device, base.dtype)


def _indices(base: BaseModel, delta: Replace, size: int) -> torch.Tensor:
    rows = list(delta.rows or ())
    if len(set(rows)) != len(rows) or not all(0 <= row < size for row in rows):
        raise rejected(delta.module, f"{delta.module}: rows must be different, from 0 to {size - 1}")
    return torch.tensor(rows, dtype=torch.int64, device=base.device)
