"""Binding deltas to the base: from a strategy's pure data to tensors ready for a slot. Whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graftwork_plugins import Delta, FullWeights, Head, LowRank, Prefix, Replace, Scale
from graftwork_server.engine.binding import bind_changes, check_values, rejected
from graftwork_server.engine.changes import Changes
from graftwork_server.engine.model import BaseModel, tuned_model, unwrapped_state
from graftwork_server.engine.prefix import bind_prefix
from graftwork_server.engine.slots import PreparedAdapter, empty_packed


def bind(base: BaseModel, digest: str, deltas: Sequence[Delta], *, place: bool = True) -> PreparedAdapter:
    """Checks every delta against the base and converts it. With place=False it only checks (device_bytes is then what
    low-rank tensors would take, 0 for a checkpoint).

    Raises FailedPrecondition naming the tensor that does not fit, and what would.
    """
    if not deltas:
        raise rejected("deltas", "the artifact holds no tensors that change the base")
    full = [delta for delta in deltas if isinstance(delta, FullWeights)]
    if full and len(deltas) > 1:
        raise rejected("deltas", "a whole checkpoint cannot be combined with other deltas")
    if full:
        return _bind_full(base, digest, full[0], place)
    for delta in deltas:
        if isinstance(delta, Prefix):
            return _bind_prefix(base, digest, deltas, delta)
        if isinstance(delta, Head):
            raise rejected("deltas", "a head of its own is not served: no method answers with its scores yet")
    of_modules = [delta for delta in deltas if isinstance(delta, LowRank | Scale | Replace)]
    changes = bind_changes(base, of_modules)
    return _bind_modules(base, digest, of_modules, changes)


def _bind_modules(
    base: BaseModel, digest: str, deltas: Sequence[LowRank | Scale | Replace], changes: Changes
) -> PreparedAdapter:
    groups = base.engine_model.groups
    linear = {name for group in groups for name in group.names}
    by_module = {delta.module: delta for delta in deltas if isinstance(delta, LowRank) and delta.module in linear}
    members = [[by_module.get(name) for name in group.names] for group in groups]
    packed = _packed(base, members) if by_module else None
    low_rank_bytes = packed.nbytes if packed is not None else 0
    return PreparedAdapter(
        digest=digest,
        modules_bound=len(set(by_module) | set(changes)),
        rank=max((delta.a.shape[-2] for delta in deltas if isinstance(delta, LowRank)), default=0),
        parameter_count=sum(_parameters(delta) for delta in deltas),
        device_bytes=low_rank_bytes + sum(change.device_bytes for made in changes.values() for change in made),
        ranks=tuple(tuple(delta.a.shape[0] if delta is not None else 0 for delta in group) for group in members),
        packed=packed,
        changes=changes,
    )


def _packed(base: BaseModel, groups: Sequence[Sequence[LowRank | None]]) -> torch.Tensor:
    """PreparedAdapter.packed of the deltas by linear group and member, whose shapes were checked."""
    deltas = [delta for members in groups for delta in members if delta is not None]
    a_elements, b_elements = (
        [tensor.numel() for tensor in side] for side in zip(*((d.a, d.b) for d in deltas), strict=True)
    )
    packed = empty_packed(sum(a_elements) + sum(b_elements), base.dtype, for_gpu=base.device.type == "cuda")
    a_side, b_side = packed.split([sum(a_elements), sum(b_elements)])
    torch._foreach_copy_(a_side.split(a_elements), [delta.a.reshape(-1) for delta in deltas])
    _write_b_sides(base, deltas, b_side.split(b_elements))
    if not math.isfinite(packed.sum().item()) and not torch.isfinite(packed).all():
        _refuse_values(deltas, base.dtype)
    return packed


def _write_b_sides(base: BaseModel, deltas: Sequence[LowRank], targets: Sequence[torch.Tensor]) -> None:
    """B [out, rank] * scaling as [rank, out], rounded once."""
    is_exact = [delta.b.dtype == base.dtype for delta in deltas]
    sources = [
        d.b if same else (d.b.float() * d.scaling).to(base.dtype) for d, same in zip(deltas, is_exact, strict=True)
    ]
    scales = [delta.scaling if same else 1.0 for delta, same in zip(deltas, is_exact, strict=True)]
    if base.engine_model.kernels is not None:
        base.engine_model.kernels.transpose([b.contiguous() for b in sources], targets, scales)
        return
    for b, target, scale in zip(sources, targets, scales, strict=True):
        torch.mul(b.t(), scale, out=target.view(b.shape[1], b.shape[0]))


def _refuse_values(deltas: Sequence[LowRank], dtype: torch.dtype) -> None:
    for delta in deltas:
        check_values(f"{delta.module}: A", delta.a, delta.module)
        check_values(f"{delta.module}: B", delta.b, delta.module)
    for delta in deltas:
        for name, tensor in (("A", delta.a), ("B times its scaling", delta.b.float() * delta.scaling)):
            if not torch.isfinite(tensor.to(dtype)).all():
                raise rejected(delta.module, f"{delta.module}: {name} is too large for {dtype}")


def _bind_prefix(base: BaseModel, digest: str, deltas: Sequence[Delta], delta: Prefix) -> PreparedAdapter:
    if len(deltas) > 1:
        raise rejected("deltas", "a prefix cannot be combined with other deltas")
    prefix = bind_prefix(base, delta)
    tensors = [delta.embeddings] if delta.embeddings is not None else [*delta.keys, *delta.values]
    return PreparedAdapter(
        digest=digest,
        modules_bound=len(prefix.keys),
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


def _bind_full(base: BaseModel, digest: str, delta: FullWeights, place: bool) -> PreparedAdapter:
    state = unwrapped_state(base)
    resident = [entry.name for entry in base.weights.layout]
    tensors = dict(delta.tensors)
    for name in set(tensors) - set(state):
        raise rejected(name, f"the base has no tensor {name}")
    for name in resident:
        if name not in tensors:
            # A tied tensor may come under either of its names.
            twin = next((n for n in tensors if n in state and state[n].data_ptr() == state[name].data_ptr()), None)
            if twin is None:
                raise rejected(name, f"the checkpoint lacks {name}")
            tensors[name] = tensors[twin]
        tensor, wanted = tensors[name], state[name]
        if tensor.shape != wanted.shape:
            raise rejected(name, f"{name} is {list(tensor.shape)}; this base takes {list(wanted.shape)}")
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise rejected(name, f"{name} is {tensor.dtype}; floating point is accepted")
        if tensor.is_floating_point():
            check_values(name, tensor)
    parameters = sum(tensors[name].numel() for name in resident)
    model, own_bytes = tuned_model(base, tensors) if place else (None, 0)
    return PreparedAdapter(
        digest=digest,
        modules_bound=len(resident),
        rank=0,
        parameter_count=parameters,
        device_bytes=own_bytes,
        model=model,
    )
