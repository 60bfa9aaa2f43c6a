"""Classification heads: a few small layers over one hidden state of each sequence, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graftwork_plugins import Head, LowRank, Replace, Scale
from graftwork_server.layers.binding.checks import check_values, rejected
from graftwork_server.layers.head import _ACTIVATIONS, BoundHead
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.wire.engine import HeadInfo

_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def bind_head(base: BaseModel, heads: Sequence[Head], others: Sequence[LowRank | Scale | Replace]) -> BoundHead:
    """The head on the base's device. `others`: the adapter's deltas of modules, which may bring a layer that the base's
    checkpoint lacks. Raises FailedPrecondition naming what does not fit."""
    if len(heads) > 1:
        raise rejected("head", "there are two heads; one is accepted")
    head = heads[0]
    if head.dense_module is not None and head.dense_weight is not None:
        raise rejected("head", "the head has a dense layer of its own and one of the base; one of them is accepted")
    if head.activation not in _ACTIVATIONS or head.pooling not in ("mean", "cls", "last"):
        what = f"activation {head.activation!r} and pooling {head.pooling!r}"
        raise rejected("head", f"the head has {what}; tanh, relu or gelu, and mean, cls or last are accepted")
    features = _features(base, head, others)
    shape = tuple(head.weight.shape)
    if len(shape) != 2 or shape[0] == 0 or shape[1] != features:
        raise rejected("head.weight", f"the head's weight is {list(shape)}; this base takes [labels, {features}]")
    labels = list(head.labels) or [f"LABEL_{row}" for row in range(shape[0])]
    if len(labels) != shape[0]:
        raise rejected("head.labels", f"the head has {len(labels)} labels and {shape[0]} rows; as many are accepted")
    problem = head.problem_type or ("regression" if shape[0] == 1 else "single_label_classification")
    if problem not in _PROBLEM_TYPES:
        raise rejected("head.problem_type", f"is {problem!r}; {', '.join(_PROBLEM_TYPES)} are accepted")
    return BoundHead(
        HeadInfo(labels, problem),
        head.pooling,
        head.pad_token_id,
        _tensor(base, "weight", head.weight, shape),
        None if head.bias is None else _tensor(base, "bias", head.bias, shape[:1]),
        head.dense_module,
        None if head.dense_weight is None else _tensor(base, "dense_weight", head.dense_weight, None),
        None if head.dense_bias is None else _tensor(base, "dense_bias", head.dense_bias, (features,)),
        head.activation,
    )


def _features(base: BaseModel, head: Head, others: Sequence[LowRank | Scale | Replace]) -> int:
    """What the last layer takes."""
    model, hidden = base.engine_model, base.engine_model.hidden_size
    if head.dense_module is not None:
        if head.dense_module not in model.head_modules:
            accepted = ", ".join(model.head_modules) or "none"
            raise rejected(
                "head.dense_module", f"is {head.dense_module}; layers of this base before a head: {accepted}"
            )
        brought = [
            delta.tensors for delta in others if isinstance(delta, Replace) and delta.module == head.dense_module
        ]
        if head.dense_module in model.missing_modules and not any({"weight", "bias"} <= set(own) for own in brought):
            raise rejected(
                head.dense_module,
                f"the head comes after {head.dense_module}, of which the base's checkpoint has no weights; accepted is "
                "an adapter that has it whole (modules_to_save), or a base with it",
            )
        return hidden
    if head.dense_weight is None:
        return hidden
    shape = list(head.dense_weight.shape)
    if len(shape) != 2 or shape[0] == 0 or shape[1] != hidden:
        raise rejected("head.dense_weight", f"the head's dense layer is {shape}; this base takes [features, {hidden}]")
    return shape[0]


def _tensor(base: BaseModel, what: str, tensor: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    if shape is not None and tuple(tensor.shape) != shape:
        raise rejected(f"head.{what}", f"the head's {what} is {list(tensor.shape)}; {list(shape)} is accepted")
    check_values(f"the head's {what}", tensor, f"head.{what}")
    return tensor.to(base.device, torch.float32).contiguous()
