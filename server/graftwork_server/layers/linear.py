"""Linear layers of the base, wrapped in place: the base's output plus the deltas of the tokens' adapters.

Layers that take the same input (q/k/v, gate/up) form one LinearGroup. The first of them that is called computes for
all of them: one GEMM over their weights, which lie side by side (base/weights.py), and one shrink over all LoRA-A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.pytorch_utils import Conv1D

from graftwork_server.base.quantization import QuantizedLinear
from graftwork_server.base.weights import FUSED_SIBLINGS
from graftwork_server.kernels.native import NativeKernels
from graftwork_server.layers.routing import Routing

LinearModule = torch.nn.Linear | Conv1D


@dataclass
class StepRouting:
    """The routing of the forward that runs now, one object shared by all layers of a model. None: base only."""

    tokens: Routing | None = None
    """rows of the packed input"""
    outputs: Routing | None = None
    """rows that reach the output layer"""
    plain: bool = False
    """Some adapter changes single modules (changes.py), so that each must be called."""


class LinearGroup:
    """One or more linear layers with the same input."""

    def __init__(
        self, index: int, members: list[tuple[str, LinearModule]], is_output: bool, kernels: NativeKernels | None
    ) -> None:
        self.index = index
        self._kernels = kernels
        self.names = [name for name, _ in members]
        self.modules = [module for _, module in members]
        self.is_output = is_output
        self.in_features = _features(self.modules[0])[0]
        self.out_features = [_features(module)[1] for module in self.modules]
        self._quantized = _quantized(self.modules)
        plain = len(members) > 1 and not isinstance(self.modules[0], QuantizedLinear)
        self.weight = fused_view([module.weight for module in self.modules]) if plain else None
        biases = [module.bias for module in self.modules if module.bias is not None]
        self.bias = fused_view(biases) if len(members) > 1 and biases else None
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._pending = 0

    @property
    def fused(self) -> bool:
        """True if one GEMM serves all members."""
        return self.weight is not None or (self._quantized is not None and len(self.modules) > 1)

    @property
    def is_plain(self) -> bool:
        """True if its weights lie as one matrix [out of all members, in] in the dtype that is computed in."""
        single = len(self.modules) == 1 and isinstance(self.modules[0], torch.nn.Linear)
        return self._quantized is None and (self.weight is not None or single)

    def addresses(self) -> tuple[int, int | None]:
        """Of the matrix of weights, and of the biases if it has some; only if it is plain."""
        weight = self.weight if self.weight is not None else self.modules[0].weight
        bias = self.bias if self.weight is not None else self.modules[0].bias
        return weight.data_ptr(), bias.data_ptr() if bias is not None else None

    def output(self, position: int, x: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """Output of member `position` for x [..., in_features], adapters included."""
        if self._input is not x:
            self._outputs = self._compute(x, routing)
            if len(self.modules) > 1:
                self._input, self._pending = x, len(self.modules)
            else:
                return self._outputs[0]
        result = self._outputs[position]
        self._pending -= 1
        if self._pending == 0:
            self._input, self._outputs = None, ()
        return result

    def forget(self) -> None:
        """Drops what is left of a forward that did not finish."""
        self._input, self._outputs, self._pending = None, (), 0

    def _compute(self, x: torch.Tensor, routing: Routing | None) -> tuple[torch.Tensor, ...]:
        y = self.whole(x, routing)
        return (y,) if len(self.modules) == 1 else y.split(self.out_features, dim=-1)

    def whole(self, x: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """Outputs of all members side by side for x [..., in_features], adapters included."""
        if self._quantized is not None:
            y = self._quantized.product(x, self._kernels)
        elif self.weight is not None:
            y = self._linear(x, self.weight, self.bias)
        elif len(self.modules) == 1 and isinstance(self.modules[0], torch.nn.Linear):
            y = self._linear(x, self.modules[0].weight, self.modules[0].bias)
        else:
            outputs = [module(x) for module in self.modules]
            y = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        if routing is not None:
            routing.add_deltas(self.index, x.view(-1, self.in_features), y.view(-1, y.shape[-1]))
        return y

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._kernels is not None and self._kernels.has_linear(x, weight.shape[0]):
            return self._kernels.linear(x, weight, bias)
        return torch.nn.functional.linear(x, weight, bias)


class AdaptedLinear(torch.nn.Module):
    """Stands where a Linear or Conv1D of the base stood."""

    def __init__(self, group: LinearGroup, position: int, step: StepRouting) -> None:
        super().__init__()
        self.base = group.modules[position]
        self.in_features, self.out_features = _features(self.base)
        self._group = group
        self._position = position
        self._step = step

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight; transformers' code reads its dtype."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]"""
        routing = self._step.outputs if self._group.is_output else self._step.tokens
        return self._group.output(self._position, x, routing)

    def is_grouped_with(self, other: AdaptedLinear) -> bool:
        """Whether this and `other` are, in this order, all of one group that one GEMM serves."""
        group = self._group
        return (
            group.fused and group is other._group and (self._position, other._position, len(group.names)) == (0, 1, 2)
        )

    def whole_group(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features of all members of the group, side by side], adapters included."""
        return self._group.whole(x, self._step.outputs if self._group.is_output else self._step.tokens)


def wrap_linears(model: torch.nn.Module, step: StepRouting, kernels: NativeKernels | None = None) -> list[LinearGroup]:
    """Replaces every Linear and Conv1D of `model` by an AdaptedLinear and returns their groups, in order."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    # A router that is a Linear may answer with more than its product.
    linears: dict[str, LinearModule] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LinearModule)
        and (isinstance(module, Conv1D | QuantizedLinear) or type(module).forward is torch.nn.Linear.forward)
    }
    groups: list[LinearGroup] = []
    taken: set[str] = set()
    for name in linears:
        if name in taken:
            continue
        names = _siblings(name, linears)
        group = LinearGroup(len(groups), [(n, linears[n]) for n in names], linears[name] is output, kernels)
        if (
            len(names) > 1 and not group.fused
        ):  # not side by side in memory: nothing is gained by computing them together
            names = [name]
            group = LinearGroup(len(groups), [(name, linears[name])], linears[name] is output, kernels)
        taken.update(names)
        groups.append(group)
        for position, member in enumerate(names):
            parent_name, _, leaf = member.rpartition(".")
            setattr(model.get_submodule(parent_name), leaf, AdaptedLinear(group, position, step))
    return groups


def fused_view(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor over `tensors` stacked along their first dimension if they lie side by side in memory, else None."""
    first = tensors[0]
    storage = first.untyped_storage().data_ptr()
    end = first.data_ptr()
    for tensor in tensors:
        # Tensors of different storages may stand side by side by chance; a view cannot reach from one to the next.
        if tensor.untyped_storage().data_ptr() != storage:
            return None
        if tensor.data_ptr() != end or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        if tensor.shape[1:] != first.shape[1:]:
            return None
        end += tensor.nbytes
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _siblings(name: str, linears: Mapping[str, LinearModule]) -> list[str]:
    """Names of the linear layers that are computed together with `name`, itself included."""
    parent, _, leaf = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for siblings in FUSED_SIBLINGS:
        members = [prefix + sibling for sibling in siblings]
        if leaf in siblings and all(isinstance(linears.get(member), torch.nn.Linear) for member in members):
            modules = [linears[member] for member in members]
            same_input = len({_features(module)[0] for module in modules}) == 1
            same_bias = len({module.bias is None for module in modules}) == 1
            if same_input and same_bias:
                return members
    return [name]


def _quantized(modules: Sequence[LinearModule]) -> QuantizedLinear | None:
    """One quantised layer over all of `modules`; None if they are not quantised, or do not lie side by side."""
    first = modules[0]
    if len(modules) == 1 or not isinstance(first, QuantizedLinear):
        return first if isinstance(first, QuantizedLinear) else None
    kind = type(first)
    if not all(type(module) is kind for module in modules):
        return None
    views = {name: fused_view([getattr(m, name) for m in modules]) for name in ("weight", kind.STATISTICS)}
    tensors = {name: view for name, view in views.items() if view is not None}
    bias = None if first.bias is None else fused_view([module.bias for module in modules])
    if len(tensors) < len(views) or (bias is None) != (first.bias is None):
        return None
    return kind((first.in_features, sum(_features(module)[1] for module in modules)), tensors, bias)


def _features(module: LinearModule) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features
