"""Classify and Embed: several texts in one request, each a sequence of its own in the engine, one answer for all."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from graftwork.v1 import generation_pb2 as pb
from graftwork_server.errors import FailedPrecondition, Internal, InvalidArgument, Violation
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.front.rpc.limits import check_prompt, in_thread_if_large, invalid
from graftwork_server.hub.resolver import Resolved
from graftwork_server.text import TextProcessor
from graftwork_server.text.strangers.isolated_text import IsolatedTexts
from graftwork_server.types import AdapterRef, ModelInfo
from graftwork_server.wire.engine import HeadInfo, Pool, Pooled

MAX_INPUTS = 256
MAX_INPUT_TOKENS = 131_072
MAX_LABEL_SCORES = 1 << 17
"""Labels of one answer: inputs times the head's labels."""
INPUTS_AT_ONCE = 64
"""Inputs of one request that the engine has at the same time: a long list must not fill its queue."""

_POOLINGS: Mapping[pb.Pooling.ValueType, str] = {
    pb.POOLING_MEAN: "mean",
    pb.POOLING_CLS: "cls",
    pb.POOLING_LAST: "last",
    pb.POOLING_MAX: "max",
    pb.POOLING_MEAN_SQRT_LEN: "mean_sqrt_len",
    pb.POOLING_WEIGHTED_MEAN: "weightedmean",
}
_POOLING_VALUES = {name: value for value, name in _POOLINGS.items()}
_PROBLEM_TYPES = {
    "single_label_classification": pb.PROBLEM_TYPE_SINGLE_LABEL,
    "multi_label_classification": pb.PROBLEM_TYPE_MULTI_LABEL,
    "regression": pb.PROBLEM_TYPE_REGRESSION,
}


# ---------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Row:
    """The tokens of one input, and their types if it is a pair of texts."""

    ids: list[int]
    token_type_ids: list[int] = field(default_factory=list)


async def rows_of(
    inputs: Sequence[pb.TextInput], text: TextProcessor | None, model: ModelInfo, texts: IsolatedTexts
) -> list[Row]:
    """The tokens of each input.

    Raises InvalidArgument naming the input that is wrong, FailedPrecondition (TOKENIZER_MISSING) for texts that nothing
    can make tokens of.
    """
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise invalid([Violation("inputs", f"has {len(inputs)} texts; 1 to {MAX_INPUTS} are accepted")])
    size = sum(len(one.text) + len(one.text_pair) for one in inputs)

    def made(text: TextProcessor | None) -> list[Row]:
        return [_row(one, index, text) for index, one in enumerate(inputs)]

    rows = made(text) if text is None or not size else await texts.run(text, size, made, "inputs")
    for index, row in enumerate(rows):
        check_prompt(row.ids, f"inputs[{index}].{inputs[index].WhichOneof('input')}", model, room_for=0)
    total = token_count(rows)
    if total > MAX_INPUT_TOKENS:
        raise invalid([Violation("inputs", f"has {total} tokens in all; at most {MAX_INPUT_TOKENS} are accepted")])
    return rows


def _row(one: pb.TextInput, index: int, text: TextProcessor | None) -> Row:
    given = one.WhichOneof("input")
    if one.text_pair and given != "text":
        raise invalid([Violation(f"inputs[{index}].text_pair", "goes with text alone; join token ids yourself")])
    if given == "token_ids":
        return Row(list(one.token_ids.ids))
    if not one.text:
        # A tokenizer may add special tokens even to nothing; the caller surely meant to send something.
        raise InvalidArgument(
            f"inputs[{index}] is empty; give text or token_ids",
            reason="PROMPT_EMPTY",
            field=f"inputs[{index}].text" if given else f"inputs[{index}]",
        )
    if text is None:
        raise FailedPrecondition(
            "the base model brings no tokenizer; give token_ids instead of text", reason="TOKENIZER_MISSING"
        )
    return Row(*text.encode_pair(one.text, one.text_pair)) if one.text_pair else Row(text.encode(one.text))


def embed_pool(request: pb.EmbedRequest, model: ModelInfo, adapter: AdapterRef | None) -> Pool:
    """How the request's vectors are made, defaults filled in. Raises InvalidArgument naming each wrong field,
    FailedPrecondition (POOLING_UNSUPPORTED) where the model's or the adapter's files ask for what is not done and the
    request for nothing."""
    violations = []
    if request.pooling != pb.POOLING_UNSPECIFIED and request.pooling not in _POOLINGS:
        accepted = ", ".join(pb.Pooling.Name(value) for value in sorted(_POOLING_VALUES.values()))
        violations.append(Violation("pooling", f"is {request.pooling}; {accepted} are accepted"))
    pooling = _POOLINGS.get(request.pooling, model.default_pooling)
    size = model.hidden_size * len(pooling.split("+"))
    if request.HasField("dimensions") and not 1 <= request.dimensions <= size:
        violations.append(Violation("dimensions", f"is {request.dimensions}; 1 to {size} is accepted"))
    if violations:
        raise invalid(violations)
    undone = f"the base model's files ask for {model.undone_pooling}" if model.undone_pooling else ""
    if adapter is not None and (Path(adapter.path) / "modules.json").is_file():
        undone = "the adapter's modules.json, of sentence-transformers, asks for a pooling of its own"
    if request.pooling == pb.POOLING_UNSPECIFIED and undone:
        raise FailedPrecondition(
            f"{undone}; Embed does not do it. Name a pooling ({', '.join(_POOLINGS.values())}) for vectors without it",
            reason="POOLING_UNSUPPORTED",
        )
    return Pool(
        "embed",
        pooling=pooling,
        normalize=request.normalize if request.HasField("normalize") else True,
        dimensions=request.dimensions,
    )


def token_count(rows: Sequence[Row]) -> int:
    """Tokens of all rows."""
    return sum(len(row.ids) for row in rows)


def places(rows: Sequence[Row]) -> int:
    """Sequences of `rows` that are in the engine at once."""
    return min(len(rows), INPUTS_AT_ONCE)


async def run(engine: EngineClient, rows: Sequence[Row], resolved: Resolved, pool: Pool) -> list[Pooled]:
    """The engine's answer for each row. The first error ends all of them, as does the caller's end."""
    pools = [
        msgspec.structs.replace(pool, token_type_ids=row.token_type_ids, names_head=index == 0)
        for index, row in enumerate(rows)
    ]
    free = asyncio.Semaphore(places(rows))

    async def one(row: Row, own: Pool) -> Pooled:
        async with free:
            return await engine.pool(row.ids, own, resolved.adapter)

    running = [asyncio.create_task(one(row, own)) for row, own in zip(rows, pools, strict=True)]
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


# ---------------------------------------------------------------------------------------------- what is answered


async def classify_response(answers: Sequence[Pooled], rows: Sequence[Row], resolved: Resolved) -> pb.ClassifyResponse:
    """Labels, logits and probabilities of every input. Raises InvalidArgument if they are too many for one answer."""
    head = answers[0].head
    if head is None:
        raise Internal("the engine sent logits without their labels", reason="ENGINE_PROTOCOL")
    scores = len(answers) * len(head.labels)
    if scores > MAX_LABEL_SCORES:
        accepted = f"{MAX_LABEL_SCORES // len(head.labels)} are accepted, as the head has {len(head.labels)} labels"
        raise invalid([Violation("inputs", f"has {len(answers)} texts; at most {accepted}")])
    return await in_thread_if_large(
        scores,
        lambda: pb.ClassifyResponse(
            results=[_classification(_floats(a), head, len(r.ids)) for a, r in zip(answers, rows, strict=True)],
            problem_type=_PROBLEM_TYPES[head.problem_type],
            usage=pb.Usage(prompt_tokens=token_count(rows)),
            model=resolved.model,
            version=resolved.version,
        ),
    )


async def embed_response(
    answers: Sequence[Pooled], rows: Sequence[Row], pool: Pool, resolved: Resolved
) -> pb.EmbedResponse:
    """The vector of every input."""
    return await in_thread_if_large(
        sum(len(answer.values) for answer in answers),
        lambda: pb.EmbedResponse(
            embeddings=[
                pb.Embedding(values=_floats(answer), input_tokens=len(row.ids))
                for answer, row in zip(answers, rows, strict=True)
            ],
            pooling=_POOLING_VALUES.get(pool.pooling, pb.POOLING_SEVERAL),
            usage=pb.Usage(prompt_tokens=token_count(rows)),
            model=resolved.model,
            version=resolved.version,
        ),
    )


def _classification(logits: Sequence[float], head: HeadInfo, tokens: int) -> pb.Classification:
    probabilities = _probabilities(logits, head.problem_type)
    best = max(range(len(logits)), key=logits.__getitem__)
    return pb.Classification(
        labels=[
            pb.LabelScore(label=label, logit=logit, probability=probability)
            for label, logit, probability in zip(head.labels, logits, probabilities, strict=True)
        ],
        predicted_label="" if head.problem_type == "regression" else head.labels[best],
        input_tokens=tokens,
    )


def _probabilities(logits: Sequence[float], problem_type: str) -> Iterable[float | None]:
    if problem_type == "regression":
        return [None] * len(logits)
    if problem_type == "multi_label_classification":
        return [1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) for x in logits]
    most = max(logits)
    exponentials = [math.exp(x - most) for x in logits]
    total = sum(exponentials)
    return [x / total for x in exponentials]


def _floats(answer: Pooled) -> array[float]:
    values = array("f")
    values.frombytes(answer.values)
    return values
