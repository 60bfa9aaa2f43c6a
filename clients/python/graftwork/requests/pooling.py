"""Calls of GenerationService about texts as a whole: Classify, Embed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from graftwork import types
from graftwork.requests.fields import build
from graftwork.responses import pooling as responses
from graftwork.transport.calls import Unary
from graftwork.v1 import generation_pb2 as pb

TextInput: TypeAlias = str | tuple[str, str] | Sequence[int]
"""A text, two texts that belong together (a question and a passage), or token ids."""

_POOLINGS = {name: value for value, name in responses.POOLINGS.items() if name != "several"}
"""What may be asked for, by name; "several" is an answer only."""

_SERVICE = "/graftwork.v1.GenerationService/"


def classify(
    model: str, inputs: TextInput | Sequence[TextInput]
) -> Unary[pb.ClassifyResponse, types.ClassificationResult]:
    """Classify."""
    request = build(pb.ClassifyRequest, model=model, inputs=_inputs(inputs))
    return Unary(_SERVICE + "Classify", request, pb.ClassifyResponse, responses.classifications, retry=True)


def embed(
    model: str,
    inputs: TextInput | Sequence[TextInput],
    pooling: types.Pooling | None,
    normalize: bool,
    dimensions: int | None,
) -> Unary[pb.EmbedResponse, types.EmbeddingResult]:
    """Embed. Raises ValueError for a pooling that there is not."""
    if pooling is not None and pooling not in _POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; {', '.join(_POOLINGS)} are accepted")
    request = build(
        pb.EmbedRequest,
        model=model,
        inputs=_inputs(inputs),
        pooling=_POOLINGS[pooling] if pooling else pb.POOLING_UNSPECIFIED,
        normalize=normalize,
        dimensions=dimensions,
    )
    return Unary(_SERVICE + "Embed", request, pb.EmbedResponse, responses.embeddings, retry=True)


def _inputs(inputs: TextInput | Sequence[TextInput]) -> list[pb.TextInput]:
    if not isinstance(inputs, str | list | tuple):
        raise TypeError(f"inputs is {inputs!r:.60}; a text, token ids, or a list of these is accepted")
    is_one = isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], int))
    all_inputs: Any = [inputs] if is_one else inputs
    return [_text_input(one, f"inputs[{index}]") for index, one in enumerate(all_inputs)]


def _text_input(one: TextInput, name: str) -> pb.TextInput:
    names = {"text": name, "text_pair": f"{name}[1]"}
    if isinstance(one, str):
        return build(pb.TextInput, names, text=one)
    if not isinstance(one, list | tuple):
        raise TypeError(f"{name} is {one!r:.60}; a text, a pair of texts, or a list of token ids is accepted")
    if len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], str):
        return build(pb.TextInput, names, text=one[0], text_pair=one[1])
    return pb.TextInput(token_ids=build(pb.TokenIds, {"ids": name}, ids=one))
