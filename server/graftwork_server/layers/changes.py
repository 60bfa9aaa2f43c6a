"""What adapters change in the base's modules beyond low-rank products, on their own rows alone.

An adapter's changes hang on modules by name, as forward hooks that stand for one forward: a batch without such an
adapter has none, and within a batch only the adapter's rows are computed again or adjusted. A hook runs after the
module, low-rank updates included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle


class RowChange(Protocol):
    """One change of one module's output."""

    @property
    def device_bytes(self) -> int:
        """What its tensors take on the device."""

    def apply(self, args: tuple[torch.Tensor, ...], y: Any) -> None:
        """Writes into y, the module's output for args. Each is a tensor [rows, ...]; y may be a tuple of such."""


@dataclass(frozen=True)
class OtherWeights:
    """The module with other parameters, run on the rows again."""

    twin: torch.nn.Module
    device_bytes: int

    def apply(self, args: tuple[torch.Tensor, ...], y: Any) -> None:
        """See RowChange."""
        result = self.twin.forward(*args)  # not called: the twin shares the module's hooks, this one among them
        for part, other in zip(_parts(y), _parts(result), strict=True):
            part.copy_(other)


@dataclass(frozen=True)
class OtherEmbeddings:
    """Other embeddings for some tokens."""

    tokens: torch.Tensor
    """[n] int64, ascending"""
    embeddings: torch.Tensor
    """[n, size], with what the layer multiplies its output by multiplied in"""

    @property
    def device_bytes(self) -> int:
        """See RowChange."""
        return self.tokens.nbytes + self.embeddings.nbytes

    def apply(self, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        """See RowChange."""
        ids = args[0]  # [rows]
        nearest = torch.searchsorted(self.tokens, ids).clamp_(max=len(self.tokens) - 1)
        replaced = self.tokens[nearest] == ids
        y.copy_(torch.where(replaced[:, None], self.embeddings[nearest], y))


@dataclass(frozen=True)
class OtherOutputs:
    """Other weights for some outputs of a linear layer."""

    outputs: torch.Tensor
    """[n] int64"""
    weight: torch.Tensor
    """[n, in_features]"""
    bias: torch.Tensor | None
    """[n], the base's"""

    @property
    def device_bytes(self) -> int:
        """See RowChange."""
        return self.outputs.nbytes + self.weight.nbytes

    def apply(self, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        """See RowChange."""
        y[:, self.outputs] = torch.nn.functional.linear(args[0], self.weight, self.bias)


@dataclass(frozen=True)
class ScaledInput:
    """A linear layer whose input is multiplied element by element."""

    layer: torch.nn.Module
    """The base's own, without adapters."""
    factors: torch.Tensor
    """[in_features]"""

    @property
    def device_bytes(self) -> int:
        """See RowChange."""
        return self.factors.nbytes

    def apply(self, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        """See RowChange."""
        y.copy_(self.layer(args[0] * self.factors))


@dataclass(frozen=True)
class Affine:
    """y * factor + offset, element by element: DoRA's magnitudes, biases, scaled outputs."""

    factor: torch.Tensor | None
    """[out_features]"""
    offset: torch.Tensor | None
    """[out_features]"""

    @property
    def device_bytes(self) -> int:
        """See RowChange."""
        return sum(tensor.nbytes for tensor in (self.factor, self.offset) if tensor is not None)

    def apply(self, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        """See RowChange."""
        if self.factor is None:
            y.add_(self.offset)  # type: ignore[arg-type]  # one of the two is there
        elif self.offset is None:
            y.mul_(self.factor)
        else:
            y.copy_(torch.addcmul(self.offset, y, self.factor))


@dataclass(frozen=True)
class EmbeddingUpdate:
    """A low-rank update of an embedding."""

    a: torch.Tensor
    """[number of embeddings, rank]"""
    b: torch.Tensor
    """[rank, size], every factor multiplied in"""

    @property
    def device_bytes(self) -> int:
        """See RowChange."""
        return self.a.nbytes + self.b.nbytes

    def apply(self, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        """See RowChange."""
        y.addmm_(self.a[args[0]], self.b)


@dataclass(frozen=True)
class ExpertsUpdate:
    """Low-rank updates of the stacked matrices of a mixture's experts; each row is sent through its experts again."""

    experts: Any
    """The base's module: gate_up_proj [experts, 2 * intermediate, hidden], down_proj [experts, hidden, intermediate]"""
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """By parameter: A [experts, rank, in_features] and B [experts, out_features, rank], the scaling multiplied in"""

    @property
    def device_bytes(self) -> int:
        """See RowChange."""
        return sum(a.nbytes + b.nbytes for a, b in self.updates.values())

    def apply(self, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        """args: hidden states [rows, hidden], experts chosen [rows, top_k] and their weights [rows, top_k]."""
        x, chosen, weights = args
        y.zero_()
        for expert in chosen.unique().tolist():
            row, place = torch.where(chosen == expert)
            gated = self.experts._apply_gate(self._linear("gate_up_proj", expert, x[row]))
            out = self._linear("down_proj", expert, gated) * weights[row, place, None]
            y.index_add_(0, row, out.to(y.dtype))

    def _linear(self, parameter: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, getattr(self.experts, parameter)[expert])
        if parameter in self.updates:
            a, b = self.updates[parameter]
            y = y + x @ a[expert].t() @ b[expert].t()
        return y


Changes = Mapping[str, Sequence[RowChange]]
"""By module name; the changes of one module are made one after another."""
ChangedRows = Sequence[tuple[slice, Changes]]
"""Rows, and what is changed for them."""


@dataclass(frozen=True)
class ChangeableModule:
    """A module whose output has one row for each token."""

    module: torch.nn.Module
    row_dim: int
    """0: [rows, ...]; 1: [1, rows, ...]; 2: [1, heads, rows, ...]"""
    is_output: bool
    """It sees the rows that logits are made of, not all."""


def changeable_modules(
    model: torch.nn.Module, row_dims: Mapping[str, int], output: torch.nn.Module | None
) -> dict[str, ChangeableModule]:
    """Modules by name that a RowChange may hang on. `row_dims`: the dimension of the rows, as a probe has seen it."""
    return {
        name: ChangeableModule(module, row_dims[name], module is output)
        for name, module in model.named_modules()
        if name in row_dims
    }


def record_row_dims(model: torch.nn.Module, tokens: int) -> tuple[dict[str, int], list[RemovableHandle]]:
    """Hooks that fill the dictionary during the next forward over `tokens` packed tokens.

    It gets, for each module with parameters of its own (or of the layer it wraps), the dimension of its tensors that
    holds the rows. A number of tokens that is no size of the model tells them apart.
    """
    found: dict[str, int] = {}

    def record(name: str, module: torch.nn.Module, args: tuple[object, ...], output: object) -> None:
        tensors = [*args, *_parts(output)]
        for dim in (1, 0, 2):
            if args and all(isinstance(t, torch.Tensor) and t.dim() > dim and t.shape[dim] == tokens for t in tensors):
                found[name] = dim
                return

    owners = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    handles = [
        model.get_submodule(name).register_forward_hook(partial(record, name))
        for name in (owner.removesuffix(".base") for owner in owners)
    ]
    return found, handles


def hook_changes(
    modules: Mapping[str, ChangeableModule], tokens: ChangedRows, outputs: ChangedRows
) -> list[RemovableHandle]:
    """Hooks for one forward in which rows of the packed input are changed as `tokens` says, kept ones as `outputs`."""
    work: dict[str, list[tuple[slice, Sequence[RowChange]]]] = defaultdict(list)
    for spans, reach_output in ((tokens, False), (outputs, True)):
        for rows, of_modules in spans:
            for name, changes in of_modules.items():
                if modules[name].is_output == reach_output:
                    work[name].append((rows, changes))
    return [
        modules[name].module.register_forward_hook(partial(_change_rows, spans, modules[name].row_dim))
        for name, spans in work.items()
    ]


def _change_rows(
    spans: list[tuple[slice, Sequence[RowChange]]],
    row_dim: int,
    module: torch.nn.Module,
    args: tuple[torch.Tensor, ...],
    output: Any,
) -> None:
    inputs = [_rows_first(arg, row_dim) for arg in args]
    outputs = [_rows_first(part, row_dim) for part in _parts(output)]
    for rows, changes in spans:
        of_rows = tuple(tensor[rows] for tensor in inputs)
        y = tuple(part[rows] for part in outputs)
        for change in changes:
            change.apply(of_rows, y if len(y) > 1 else y[0])


def _parts(output: Any) -> tuple[Any, ...]:
    """A router answers with several tensors, other modules with one."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _rows_first(tensor: torch.Tensor, row_dim: int) -> torch.Tensor:
    """A view [rows, ...]."""
    if row_dim == 0:
        return tensor
    return tensor[0] if row_dim == 1 else tensor[0].transpose(0, 1)
