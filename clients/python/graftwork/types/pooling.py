"""What classifying and embedding return: one answer for each text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from graftwork.types.generation import Usage

Pooling: TypeAlias = Literal["mean", "cls", "last", "max", "mean_sqrt_len", "weightedmean"]
AnsweredPooling: TypeAlias = Pooling | Literal["several"]
"""several: their vectors one after another, as the base model's files say."""
ProblemType: TypeAlias = Literal["single_label", "multi_label", "regression"]


@dataclass(frozen=True)
class LabelScore:
    """One label for one text; probability is None where the head says values (problem_type "regression")."""

    label: str
    logit: float
    probability: float | None


@dataclass(frozen=True)
class Classification:
    """The labels of one text, in the order of the head's outputs.

    predicted_label: the one with the highest logit, "" for problem_type "regression". input_tokens: tokens of the text.
    """

    labels: tuple[LabelScore, ...]
    predicted_label: str
    input_tokens: int


@dataclass(frozen=True)
class ClassificationResult:
    """One Classification for each input, in their order. model and version: who answered (version 0: the base model).

    problem_type: "single_label" (probabilities are the softmax of the logits), "multi_label" (the sigmoid of each), or
    "regression" (the logits are the values).
    """

    results: tuple[Classification, ...]
    problem_type: ProblemType
    usage: Usage
    model: str
    version: int


@dataclass(frozen=True)
class Embedding:
    """The vector of one text, and the tokens that the text has."""

    values: tuple[float, ...]
    input_tokens: int


@dataclass(frozen=True)
class EmbeddingResult:
    """One Embedding for each input, in their order. pooling: how they were made. model and version: who answered."""

    embeddings: tuple[Embedding, ...]
    pooling: AnsweredPooling
    usage: Usage
    model: str
    version: int
