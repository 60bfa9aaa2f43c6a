"""Why a sequence ends, and the error it ends with where that is no answer."""

from __future__ import annotations

from collections.abc import Collection

from graftwork_server.engine.sampling.grammars import too_complex
from graftwork_server.engine.scheduling.sequence import Sequence
from graftwork_server.errors import ErrorBody
from graftwork_server.wire.engine import Generate


def finish_reason(sequence: Sequence, token: int, eos_token_ids: Collection[int]) -> str:
    """ "stop" or "length" if `token`, its newest one, is its last one; else ""."""
    sampling = sequence.request.sampling
    matcher = sequence.processing.matcher if sequence.processing else None
    if matcher is not None and matcher.is_stopped():
        return "stop"
    if (token in eos_token_ids and not sampling.ignore_eos) or token in sampling.stop_token_ids:
        return "stop"
    return "length" if sequence.generated >= sampling.max_tokens else ""


def never_fits(request: Generate, kv_tokens: int) -> ErrorBody | None:
    """The error for a request that is longer than the whole KV cache."""
    needed = len(request.prompt_ids) + request.sampling.max_tokens
    if needed <= kv_tokens:
        return None
    message = f"prompt and max_tokens are {needed} tokens; the KV cache holds {kv_tokens}"
    return ErrorBody(code="INVALID_ARGUMENT", reason="KV_CACHE_TOO_SMALL", message=message)


def refused(sequence: Sequence) -> ErrorBody:
    """The error for a sequence that is_refused, now that its adapter is known."""
    if sequence.misdirected:
        return no_head(of_adapter=True) if sequence.classifies else only_head()
    asked = len(sequence.request.prompt_ids) + sequence.request.sampling.max_tokens
    virtual = sequence.adapter.prefix.tokens if sequence.adapter and sequence.adapter.prefix else 0
    message = (
        f"prompt and max_tokens are {asked} tokens and the adapter puts {virtual} virtual tokens before them; "
        f"{sequence.longest} fit in all, so {sequence.longest - virtual} of the request's own"
    )
    return ErrorBody(code="INVALID_ARGUMENT", reason="PROMPT_TOO_LONG", message=message)


def not_finite(sequence: Sequence) -> ErrorBody:
    """The error for a sequence whose logits or vector are NaN or infinite."""
    who = "the base model" if sequence.digest is None else "the adapter"
    what = "logits" if sequence.request.pool is None else "values"
    message = f"{who} gave {what} that are NaN or infinite; its weights overflow in this dtype"
    return ErrorBody(code="FAILED_PRECONDITION", reason="LOGITS_NOT_FINITE", message=message)


def nothing_allowed(sequence: Sequence) -> ErrorBody:
    """The error for a sequence that no token can follow."""
    grammar = sequence.request.sampling.grammar
    matcher = sequence.processing.matcher if sequence.processing else None
    if grammar is not None and matcher is not None and matcher.is_error():
        return too_complex(grammar, matcher.get_error())
    message = (
        "bad_words, logit_bias, min_tokens and what the output must look like leave no token to go on with, after "
        f"{sequence.generated} tokens; allow more"
    )
    return ErrorBody(code="FAILED_PRECONDITION", reason="NO_TOKEN_ALLOWED", message=message)


def no_head(of_adapter: bool) -> ErrorBody:
    """The answer to Classify where nothing can classify."""
    who = "the adapter" if of_adapter else "the base model"
    others = "" if of_adapter else ", or a base model whose checkpoint is an encoder's ForSequenceClassification"
    return ErrorBody(
        code="FAILED_PRECONDITION",
        reason="HEAD_MISSING",
        message=f"{who} has no classification head; Classify takes adapters that PEFT saved with task_type SEQ_CLS"
        f"{others}",
    )


def only_head() -> ErrorBody:
    """The answer to requests for tokens to an adapter that has a head in the place of the output layer."""
    return ErrorBody(
        code="FAILED_PRECONDITION",
        reason="ADAPTER_CLASSIFIES",
        message="the adapter has a classification head and generates no tokens; use Classify or Embed with it, or "
        "generate with the base model or with an adapter of task_type CAUSAL_LM",
    )
