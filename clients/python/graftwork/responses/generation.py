"""Answers of GenerationService about tokens: generations, scores, tokenizations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graftwork import types
from graftwork.responses.fields import from_message, optional
from graftwork.v1 import generation_pb2 as pb

_FINISH: Mapping[int, types.FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


def usage(message: pb.Usage) -> types.Usage:
    """Token counts."""
    return from_message(types.Usage, message)


def chunk(message: pb.GenerateResponse | pb.ChatResponse) -> types.GenerationChunk:
    """One piece of a generation or of an answer; both messages have the same fields."""
    return from_message(
        types.GenerationChunk,
        message,
        token_ids=tuple(message.token_ids),
        logprobs=_token_logprobs(message.logprobs),
        finish_reason=_FINISH.get(message.finish_reason),
        usage=usage(message.usage) if message.HasField("usage") else None,
        score=optional(message, "score"),
        prompt_logprobs=_token_logprobs(message.prompt_logprobs),
    )


def score(message: pb.ScoreResponse) -> types.Score:
    """The log probabilities of a given text."""
    return from_message(types.Score, message, tokens=_token_logprobs(message.tokens))


def tokenization(message: pb.TokenizeResponse) -> types.Tokenization:
    """Token ids and their texts."""
    return types.Tokenization(tuple(message.token_ids), tuple(message.tokens), message.context_tokens)


def _token_logprobs(entries: Iterable[pb.TokenLogprob]) -> tuple[types.TokenLogprob, ...]:
    """Tokens with their log probabilities and the alternatives."""
    return tuple(
        from_message(
            types.TokenLogprob,
            entry,
            logprob=optional(entry, "logprob"),
            top=tuple(from_message(types.TopLogprob, top) for top in entry.top),
        )
        for entry in entries
    )
