"""Binding deltas to the base: from a strategy's pure data to tensors ready for a slot. Whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graftwork_plugins import Delta, FullWeights, LowRank
from graftwork_server.engine.model import BaseModel, tuned_model, unwrapped_state
from graftwork_server.engine.slots import PreparedAdapter
from graftwork_server.errors import FailedPrecondition


def bind(base: BaseModel, digest: str, deltas: Sequence[Delta], *, place: bool = True) -> PreparedAdapter:
    """Checks every delta against the base and converts it. With place=False it only checks (device_bytes is then what
    low-rank tensors would take, 0 for a checkpoint).

    Raises FailedPrecondition naming the tensor that does not fit, and what would.
    """
    if not deltas:
        raise _rejected("deltas", "the artifact holds no tensors that change the base")
    full = [delta for delta in deltas if isinstance(delta, FullWeights)]
    if full and len(deltas) > 1:
        raise _rejected("deltas", "a whole checkpoint cannot be combined with other deltas")
    if full:
        return _bind_full(base, digest, full[0], place)
    return _bind_low_rank(base, digest, [delta for delta in deltas if isinstance(delta, LowRank)])


def _bind_low_rank(base: BaseModel, digest: str, deltas: Sequence[LowRank]) -> PreparedAdapter:
    by_module: dict[str, LowRank] = {}
    for delta in deltas:
        if delta.module in by_module:
            raise _rejected(delta.module, f"two deltas for {delta.module}")
        by_module[delta.module] = delta
    groups = base.engine_model.groups
    known = {name for group in groups for name in group.names}
    unknown = sorted(set(by_module) - known)
    if unknown:
        raise _rejected(unknown[0], f"the base has no linear layer {unknown[0]}; it has, say, {sorted(known)[0]}")
    ranks: list[tuple[int, ...]] = []
    tensors: list[tuple[torch.Tensor, list[torch.Tensor]] | None] = []
    for group in groups:
        members = [by_module.get(name) for name in group.names]
        for member, out_features in zip(members, group.out_features, strict=True):
            if member is not None:
                _check_low_rank(member, group.in_features, out_features)
        ranks.append(tuple(delta.a.shape[0] if delta is not None else 0 for delta in members))
        present = [delta for delta in members if delta is not None]
        if not present:
            tensors.append(None)
            continue
        a = torch.cat([delta.a.float() for delta in present]).to(base.dtype)  # [sum of ranks, in]
        bs = [(delta.b.float() * delta.scaling).t().contiguous().to(base.dtype) for delta in present]  # [rank, out]
        tensors.append((a, bs))
    return PreparedAdapter(
        digest=digest,
        modules_bound=len(by_module),
        rank=max(max(group) for group in ranks),
        parameter_count=sum(delta.a.numel() + delta.b.numel() for delta in deltas),
        device_bytes=sum(t[0].nbytes + sum(b.nbytes for b in t[1]) for t in tensors if t is not None),
        ranks=tuple(ranks),
        tensors=tensors,
    )


def _check_low_rank(delta: LowRank, in_features: int, out_features: int) -> None:
    a, b = tuple(delta.a.shape), tuple(delta.b.shape)
    if len(a) != 2 or len(b) != 2 or a[1] != in_features or b[0] != out_features or a[0] != b[1] or a[0] == 0:
        raise _rejected(
            delta.module,
            f"{delta.module}: A is {list(a)} and B is {list(b)}; this base takes [rank, {in_features}] and "
            f"[{out_features}, rank]",
        )
    for name, tensor in (("A", delta.a), ("B", delta.b)):
        if not tensor.is_floating_point():
            raise _rejected(delta.module, f"{delta.module}: {name} is {tensor.dtype}, floating point is accepted")
        if not torch.isfinite(tensor).all():
            raise _rejected(delta.module, f"{delta.module}: {name} holds NaN or infinite values")
    if not -1e6 < delta.scaling < 1e6:
        raise _rejected(delta.module, f"{delta.module}: the scaling {delta.scaling} is not a usable number")


def _bind_full(base: BaseModel, digest: str, delta: FullWeights, place: bool) -> PreparedAdapter:
    state = unwrapped_state(base)
    resident = [entry.name for entry in base.weights.layout]
    tensors = dict(delta.tensors)
    for name in set(tensors) - set(state):
        raise _rejected(name, f"the base has no tensor {name}")
    for name in resident:
        if name not in tensors:
            # A tied tensor may come under either of its names.
            twin = next((n for n in tensors if n in state and state[n].data_ptr() == state[name].data_ptr()), None)
            if twin is None:
                raise _rejected(name, f"the checkpoint lacks {name}")
            tensors[name] = tensors[twin]
        tensor, wanted = tensors[name], state[name]
        if tensor.shape != wanted.shape:
            raise _rejected(name, f"{name} is {list(tensor.shape)}; this base takes {list(wanted.shape)}")
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise _rejected(name, f"{name} is {tensor.dtype}; floating point is accepted")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise _rejected(name, f"{name} holds NaN or infinite values")
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


def _rejected(field: str, message: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason="ARTIFACT_REJECTED", field=field)
