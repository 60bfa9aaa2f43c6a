"""Answers of GenerationService about texts as a whole: classifications and embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from graftwork import types
from graftwork.responses.fields import from_message, optional
from graftwork.responses.generation import usage
from graftwork.v1 import generation_pb2 as pb

POOLINGS: Mapping[int, types.AnsweredPooling] = {
    pb.POOLING_MEAN: "mean",
    pb.POOLING_CLS: "cls",
    pb.POOLING_LAST: "last",
    pb.POOLING_MAX: "max",
    pb.POOLING_MEAN_SQRT_LEN: "mean_sqrt_len",
    pb.POOLING_WEIGHTED_MEAN: "weightedmean",
    pb.POOLING_SEVERAL: "several",
}
_PROBLEM_TYPES: Mapping[int, types.ProblemType] = {
    pb.PROBLEM_TYPE_SINGLE_LABEL: "single_label",
    pb.PROBLEM_TYPE_MULTI_LABEL: "multi_label",
    pb.PROBLEM_TYPE_REGRESSION: "regression",
}


def classifications(message: pb.ClassifyResponse) -> types.ClassificationResult:
    """The labels of every input."""
    return from_message(
        types.ClassificationResult,
        message,
        results=tuple(
            from_message(types.Classification, result, labels=tuple(map(_label_score, result.labels)))
            for result in message.results
        ),
        problem_type=_PROBLEM_TYPES.get(message.problem_type, "regression"),
        usage=usage(message.usage),
    )


def _label_score(message: pb.LabelScore) -> types.LabelScore:
    return from_message(types.LabelScore, message, probability=optional(message, "probability"))


def embeddings(message: pb.EmbedResponse) -> types.EmbeddingResult:
    """The vector of every input."""
    return from_message(
        types.EmbeddingResult,
        message,
        embeddings=tuple(types.Embedding(tuple(one.values), one.input_tokens) for one in message.embeddings),
        pooling=POOLINGS.get(message.pooling, "mean"),
        usage=usage(message.usage),
    )
