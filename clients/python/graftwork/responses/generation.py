"""Answers of GenerationService about tokens: generations, scores, tokenizations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graftwork import types
from graftwork.responses.fields import from_message
from graftwork.v1 import generation_pb2 as pb

_FINISH: Mapping[int, types.FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


def usage(message: pb.Usage) -> types.Usage:
    """Token counts."""
    return types.Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def chunk(message: pb.GenerateResponse | pb.ChatResponse) -> types.GenerationChunk:
    """One piece of a generation or of an answer; both messages have the same fields."""
    # Field by field: there may be one piece for each token, and from_message takes twice as long.
    return types.GenerationChunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_token_logprobs(message.logprobs),
        finish_reason=_FINISH.get(message.finish_reason),
        usage=usage(message.usage) if message.HasField("usage") else None,
        model=message.model,
        version=message.version,
        index=message.index,
        score=message.score if message.HasField("score") else None,
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
        types.TokenLogprob(
            token_id=entry.token_id,
            text=entry.text,
            logprob=entry.logprob if entry.HasField("logprob") else None,
            top=tuple(types.TopLogprob(top.token_id, top.text, top.logprob) for top in entry.top),
        )
        for entry in entries
    )
