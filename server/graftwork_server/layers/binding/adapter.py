"""Binding deltas to the base: from a strategy's pure data to tensors ready for a slot. Whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from graftwork_plugins import Delta, FullWeights, Head, LowRank, Prefix, Replace, Scale, without_derived
from graftwork_server.layers.binding.checks import check_values, rejected
from graftwork_server.layers.binding.head import bind_head
from graftwork_server.layers.binding.modules import bind_changes
from graftwork_server.layers.binding.prefix import bind_prefix
from graftwork_server.layers.binding.prepared import PreparedAdapter
from graftwork_server.layers.changes import Changes
from graftwork_server.layers.head import BoundHead
from graftwork_server.layers.models.base_model import BaseModel, tuned_model, unwrapped_state


def bind(base: BaseModel, digest: str, deltas: Sequence[Delta], *, place: bool = True) -> PreparedAdapter:
    """Checks every delta against the base and converts what does not go into a slot. With place=False it only checks
    (device_bytes is then what low-rank tensors would take, 0 for a checkpoint), and the values of low-rank updates too.

    Raises FailedPrecondition naming the tensor that does not fit, and what would.
    """
    if not deltas:
        raise rejected("deltas", "the artifact holds no tensors that change the base")
    full = [delta for delta in deltas if isinstance(delta, FullWeights)]
    if full and len(deltas) > 1:
        raise rejected("deltas", "a whole checkpoint cannot be combined with other deltas")
    if not base.info.generates and any(isinstance(delta, FullWeights | Prefix) for delta in deltas):
        raise rejected("deltas", "an encoder takes deltas of modules and heads, no whole checkpoint and no prefix")
    if full:
        return _bind_full(base, digest, full[0], place)
    for delta in deltas:
        if isinstance(delta, Prefix):
            return _bind_prefix(base, digest, deltas, delta)
    of_modules = [delta for delta in deltas if isinstance(delta, LowRank | Scale | Replace)]
    changes = bind_changes(base, of_modules)
    heads = [delta for delta in deltas if isinstance(delta, Head)]
    head = bind_head(base, heads, of_modules) if heads else None
    prepared = _bind_modules(base, digest, of_modules, changes, head)
    if not place:  # where a slot is filled, their values are seen then
        for delta in [delta for of_group in prepared.updates for delta in of_group]:
            check_values(f"{delta.module}: A", delta.a, delta.module)
            check_values(f"{delta.module}: B", delta.b, delta.module)
    return prepared


def _bind_modules(
    base: BaseModel,
    digest: str,
    deltas: Sequence[LowRank | Scale | Replace],
    changes: Changes,
    head: BoundHead | None,
) -> PreparedAdapter:
    groups = base.engine_model.groups
    linear = {name for group in groups for name in group.names}
    by_module = {delta.module: delta for delta in deltas if isinstance(delta, LowRank) and delta.module in linear}
    members = [[by_module.get(name) for name in group.names] for group in groups]
    updates = [present for of_group in members if (present := [delta for delta in of_group if delta is not None])]
    elements = sum(delta.a.numel() + delta.b.numel() for delta in by_module.values())
    low_rank_bytes = elements * base.dtype.itemsize
    return PreparedAdapter(
        digest=digest,
        modules_bound=len(set(by_module) | set(changes)) + (head is not None),
        rank=max((delta.a.shape[-2] for delta in deltas if isinstance(delta, LowRank)), default=0),
        parameter_count=sum(_parameters(delta) for delta in deltas) + (head.parameter_count if head else 0),
        device_bytes=low_rank_bytes
        + sum(change.device_bytes for made in changes.values() for change in made)
        + (head.device_bytes if head else 0),
        ranks=tuple(tuple(delta.a.shape[0] if delta is not None else 0 for delta in group) for group in members),
        updates=updates,
        changes=changes,
        head=head,
    )


def _bind_prefix(base: BaseModel, digest: str, deltas: Sequence[Delta], delta: Prefix) -> PreparedAdapter:
    if len(deltas) > 1:
        raise rejected("deltas", "a prefix cannot be combined with other deltas")
    prefix = bind_prefix(base, delta)
    tensors = [delta.embeddings] if delta.embeddings is not None else [*delta.keys, *delta.values]
    return PreparedAdapter(
        digest=digest,
        modules_bound=len(prefix.keys[0]),
        rank=0,
        parameter_count=sum(tensor.numel() for tensor in tensors),
        device_bytes=prefix.device_bytes,
        prefix=prefix,
    )


def _parameters(delta: LowRank | Scale | Replace) -> int:
    if isinstance(delta, Scale):
        return delta.factors.numel()
    if isinstance(delta, Replace):
        return 0 if delta.copy_of_base else sum(tensor.numel() for tensor in delta.tensors.values())
    tensors = (delta.a, delta.b, delta.bias, delta.magnitude)
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def _is_ignored(model: torch.nn.Module, name: str) -> bool:
    """Whether transformers' class says of a tensor in a checkpoint that it does without it."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _bind_full(base: BaseModel, digest: str, delta: FullWeights, place: bool) -> PreparedAdapter:
    if base.info.quantization != "none":
        raise rejected(
            "deltas",
            f"a whole checkpoint is not served beside a base quantised to {base.info.quantization}; start the server "
            "with --quantization none for it",
        )
    state = unwrapped_state(base)
    given: dict[int, list[str]] = {}
    for name in delta.tensors.keys() & state.keys():
        given.setdefault(state[name].data_ptr(), []).append(name)
    for name in sorted(without_derived(delta.tensors).keys() - state.keys()):
        if not _is_ignored(base.engine_model.model, name):
            raise rejected(name, f"the base has no tensor {name}")
    tensors: dict[str, torch.Tensor] = {}
    for name in (entry.name for entry in base.weights.layout):
        # What the base ties comes under either name. Under both, with values of its own, it is not tied here.
        names = given.get(state[name].data_ptr(), [])
        if not names:
            raise rejected(name, f"the checkpoint lacks {name}")
        tensors[name] = delta.tensors[name if name in names else names[0]]
        tensors |= {n: delta.tensors[n] for n in names if not _are_equal(delta.tensors[n], tensors[name])}
    for name, tensor in tensors.items():
        wanted = state[name]
        if tensor.shape != wanted.shape:
            raise rejected(name, f"{name} is {list(tensor.shape)}; this base takes {list(wanted.shape)}")
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise rejected(name, f"{name} is {tensor.dtype}; floating point is accepted")
        if tensor.is_floating_point():
            check_values(name, tensor)
    model, own_bytes = tuned_model(base, tensors) if place else (None, 0)
    return PreparedAdapter(
        digest=digest,
        modules_bound=len(tensors),
        rank=0,
        parameter_count=sum(tensor.numel() for tensor in tensors.values()),
        device_bytes=own_bytes,
        model=model,
    )


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
