"""What tensors of an adapter must be, and the error where they are not."""

from __future__ import annotations

import math

import torch

from graftwork_plugins import LowRank
from graftwork_server.errors import FailedPrecondition


def rejected(field: str, message: str) -> FailedPrecondition:
    """The error for an artifact that does not fit."""
    return FailedPrecondition(message, reason="ARTIFACT_REJECTED", field=field)


def check_low_rank(delta: LowRank, in_features: int, out_features: int, *, values: bool = True) -> None:
    """Raises FailedPrecondition unless A and B fit a module of these sizes; without `values`, whatever their values."""
    a, b = tuple(delta.a.shape), tuple(delta.b.shape)
    if len(a) != 2 or len(b) != 2 or a[1] != in_features or b[0] != out_features or a[0] != b[1] or a[0] == 0:
        raise rejected(
            delta.module,
            f"{delta.module}: A is {list(a)} and B is {list(b)}; this base takes [rank, {in_features}] and "
            f"[{out_features}, rank]",
        )
    _check_tensors_and_scaling(delta, values)


def _check_tensors_and_scaling(delta: LowRank, values: bool = True) -> None:
    check = check_values if values else _check_floating
    for name, tensor in (("A", delta.a), ("B", delta.b)):
        check(f"{delta.module}: {name}", tensor, delta.module)
    if not -1e6 < delta.scaling < 1e6:
        raise rejected(delta.module, f"{delta.module}: the scaling {delta.scaling} is not a usable number")


def check_values(name: str, tensor: torch.Tensor, key: str | None = None) -> None:
    """Raises FailedPrecondition, with `key` or the name as its field, unless values are floating point and finite."""
    _check_floating(name, tensor, key)
    # A finite sum has finite terms, and costs a tenth of isfinite. One that is not finite may just have overflowed.
    if not math.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
        raise rejected(key or name, f"{name} holds NaN or infinite values")


def _check_floating(name: str, tensor: torch.Tensor, key: str | None = None) -> None:
    if not tensor.is_floating_point():
        raise rejected(key or name, f"{name} is {tensor.dtype}, floating point is accepted")
