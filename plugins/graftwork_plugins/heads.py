"""Heads as transformers' ForSequenceClassification classes build them: which layers, and their outputs' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from graftwork_plugins.deltas import Head, ProblemType
from graftwork_plugins.strategy import ArtifactError

if TYPE_CHECKING:
    import torch

_MAX_LABELS = 65_536
_MAX_LABEL_CHARACTERS = 256


@dataclass(frozen=True)
class HeadLayout:
    """The layers between a model's last hidden states and its labels' logits, by their names in the whole model."""

    outputs: tuple[str, ...]
    """Names that the last layer can have; none: heads of this architecture are not served."""
    pooling: Literal["last", "cls", "mean"]
    dense: str | None = None
    """A layer before it that belongs to the head."""
    trunk_dense: str | None = None
    """A layer before it that belongs to the trunk, by its name there."""
    activation: Literal["tanh", "relu", "gelu"] = "tanh"
    unused: str = ""
    """A part of the trunk that the class with a head does without."""

    @property
    def modules(self) -> tuple[str, ...]:
        """All layers that belong to the head."""
        return self.outputs if self.dense is None else (*self.outputs, self.dense)


_ROBERTA = HeadLayout(("classifier.out_proj",), "cls", dense="classifier.dense", unused="pooler")

ENCODERS: Mapping[str, HeadLayout] = {
    "bert": HeadLayout(("classifier",), "cls", trunk_dense="pooler.dense"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": HeadLayout(("classifier.out_proj",), "cls", dense="classifier.dense", activation="gelu"),
    "modernbert": HeadLayout((), "cls"),
    "distilbert": HeadLayout(("classifier",), "cls", dense="pre_classifier", activation="relu"),
}
"""Encoders that are served, by model_type."""

_DECODER = HeadLayout(("score", "classifier"), "last")


def layout_of(config: Mapping[str, Any]) -> HeadLayout:
    """The layout for a base of this configuration: a decoder's unless it is one of ENCODERS."""
    return ENCODERS.get(str(config.get("model_type")), _DECODER)


def head_of(tensors: Mapping[str, torch.Tensor], layout: HeadLayout, document: Mapping[str, Any], file: str) -> Head:
    """The head whose layers are `tensors` ("score.weight"), with what `document` (the model's configuration, of `file`)
    says of labels. Raises ArtifactError naming the tensor or key that is missing or does not fit."""
    if not layout.outputs:
        accepted = ", ".join(name for name, known in ENCODERS.items() if known.outputs)
        raise ArtifactError("task_type", f"heads on this base are not served; accepted are those on {accepted}")
    output = next((name for name in layout.outputs if f"{name}.weight" in tensors), layout.outputs[0])
    weight = _needed(tensors, f"{output}.weight")
    dense = None if layout.dense is None else _needed(tensors, f"{layout.dense}.weight")
    return Head(
        weight=weight,
        bias=tensors.get(f"{output}.bias"),
        pooling=layout.pooling,
        pad_token_id=_pad_token(document, file),
        labels=_labels(document, len(weight) if weight.dim() else 0, file),
        problem_type=_problem_type(document, file),
        dense_module=layout.trunk_dense,
        dense_weight=dense,
        dense_bias=None if layout.dense is None else tensors.get(f"{layout.dense}.bias"),
        activation=layout.activation,
    )


def _needed(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        there = f"there are {', '.join(sorted(tensors)[:4])}" if tensors else "no layer of a head is there"
        raise ArtifactError(name, f"the head has no {name}; {there}")
    return tensors[name]


def _labels(document: Mapping[str, Any], rows: int, file: str) -> list[str]:
    if rows > _MAX_LABELS:
        raise ArtifactError("id2label", f"the head has {rows} rows; at most {_MAX_LABELS} are accepted")
    names = document.get("id2label")
    if names is None:
        count = document.get("num_labels")
        if count is not None and count != rows:
            raise ArtifactError("num_labels", f"{file}: num_labels is {count!r}, the head has {rows} rows")
        return []
    by_row = {str(key): value for key, value in names.items()} if isinstance(names, Mapping) else {}
    if sorted(by_row) != sorted(map(str, range(len(by_row)))) or not by_row:
        raise ArtifactError("id2label", f'{file}: id2label must be an object of names by "0", "1", ... without gaps')
    if len(by_row) != rows:
        raise ArtifactError("id2label", f"{file}: id2label names {len(by_row)} labels, the head has {rows} rows")
    for name in by_row.values():
        if not isinstance(name, str) or not 1 <= len(name) <= _MAX_LABEL_CHARACTERS:
            accepted = f"texts of 1 to {_MAX_LABEL_CHARACTERS} characters are accepted"
            raise ArtifactError("id2label", f"{file}: id2label has the name {str(name)[:40]!r}; {accepted}")
    return [by_row[str(row)] for row in range(rows)]


def _problem_type(document: Mapping[str, Any], file: str) -> ProblemType | None:
    given: ProblemType | None = document.get("problem_type")
    if given is not None and given not in get_args(ProblemType):
        accepted = f"{', '.join(get_args(ProblemType))} or null is accepted"
        raise ArtifactError("problem_type", f"{file}: problem_type is {str(given)[:40]!r}; {accepted}")
    return given


def _pad_token(document: Mapping[str, Any], file: str) -> int | None:
    given: int | None = document.get("pad_token_id")
    if given is not None and type(given) is not int:
        raise ArtifactError("pad_token_id", f"{file}: pad_token_id is {str(given)[:40]!r}; a token id or null")
    return given
