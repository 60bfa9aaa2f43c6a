"""SamplingParameters as the engine takes them: each field's range, checked before anything is allocated for it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.v1 import generation_pb2 as pb
from graftwork_server.errors import FailedPrecondition
from graftwork_server.front.rpc.generation.structured import grammar_of
from graftwork_server.front.rpc.limits import MAX_LOGPROBS, Violations, check_prompt_logprobs, context_limit
from graftwork_server.text import TextProcessor
from graftwork_server.types import ModelInfo
from graftwork_server.wire.engine import Sampling

DEFAULT_MAX_TOKENS = 256
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 100.0
MAX_LOGIT_BIAS = 100.0
REPETITION_PENALTIES = (0.01, 100.0)
MAX_STOPS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 128
MAX_WORD_CHARACTERS = 256
MAX_BIASED_TOKENS = 1024
MAX_SAMPLES = 32


def sampling_of(
    parameters: pb.SamplingParameters,
    prompt_tokens: int,
    model: ModelInfo,
    tokenizer: TextProcessor | None,
    violations: Violations,
) -> Sampling:
    """The parameters with every default filled in.

    Raises InvalidArgument naming each field that is out of range, and what `wrong` has noted before; FailedPrecondition
    (TOKENIZER_MISSING) for texts that nothing can make tokens of.
    """
    left = context_limit(model) - prompt_tokens
    max_tokens = parameters.max_tokens if parameters.HasField("max_tokens") else min(DEFAULT_MAX_TOKENS, left)
    logprobs = parameters.logprobs if parameters.HasField("logprobs") else None
    violations.unless(max_tokens >= 1, "max_tokens", f"is {max_tokens}; it must be at least 1")
    violations.unless(
        max_tokens <= left,
        "max_tokens",
        f"is {max_tokens}; the prompt's {prompt_tokens} tokens leave room for at most {left} in the context of "
        f"{context_limit(model)}",
    )
    violations.unless(
        0 <= parameters.min_tokens <= max(max_tokens, 0),
        "min_tokens",
        f"is {parameters.min_tokens}; 0 to max_tokens ({max_tokens}) is accepted",
    )
    violations.unless(
        logprobs is None or 0 <= logprobs <= MAX_LOGPROBS,
        "logprobs",
        f"is {logprobs}; 0 to {MAX_LOGPROBS} is accepted",
    )
    numbers = _numbers(parameters, model, violations)
    grammar = grammar_of(parameters.structured_output, violations) if parameters.HasField("structured_output") else None
    _check_lists(parameters, model, violations)
    violations.raise_if_any()
    if grammar is not None and tokenizer is None:
        raise FailedPrecondition(
            "the base model brings no tokenizer, so structured_output cannot be held against its tokens",
            reason="TOKENIZER_MISSING",
        )
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=parameters.min_tokens,
        seed=parameters.seed if parameters.HasField("seed") else secrets.randbits(63),
        ignore_eos=parameters.ignore_eos,
        logprobs=logprobs,
        top_k=parameters.top_k,
        logit_bias=dict(parameters.logit_bias),
        bad_words=_bad_words(parameters.bad_words, tokenizer),
        stop_token_ids=list(parameters.stop_token_ids),
        grammar=grammar,
        **numbers,
    )


@dataclass(frozen=True)
class SampleCounts:
    """How many completions are sampled, how many returned, and whether they are ranked by score."""

    sampled: int
    returned: int
    scored: bool


def sample_counts(parameters: pb.SamplingParameters, max_queue: int, violations: Violations) -> SampleCounts:
    """n and best_of, or a note of what is wrong; no request has more than the whole queue may."""
    most = min(MAX_SAMPLES, max_queue)
    n = parameters.n if parameters.HasField("n") else 1
    best_of = parameters.best_of if parameters.HasField("best_of") else n
    violations.unless(1 <= n <= most, "n", f"is {n}; 1 to {most} is accepted")
    if parameters.HasField("best_of"):
        accepted = max(n, 1) <= best_of <= most
        violations.unless(accepted, "best_of", f"is {best_of}; n ({n}) to {most} is accepted")
    return SampleCounts(best_of, n, parameters.HasField("best_of"))


def prompt_logprobs_of(parameters: pb.SamplingParameters, prompt_tokens: int, violations: Violations) -> int | None:
    """prompt_logprobs, None if it is not set, or a note of what is wrong."""
    if not parameters.HasField("prompt_logprobs"):
        return None
    check_prompt_logprobs(parameters.prompt_logprobs, "sampling.prompt_logprobs", prompt_tokens, violations)
    return parameters.prompt_logprobs


def _numbers(parameters: pb.SamplingParameters, model: ModelInfo, violations: Violations) -> dict[str, float]:
    """The real-valued fields, defaults filled in. A NaN is in no range."""
    values: dict[str, float] = {
        name: getattr(parameters, name) if parameters.HasField(name) else default  # type: ignore[arg-type]
        for name, default in (
            ("temperature", 0.0),
            ("top_p", 1.0),
            ("min_p", 0.0),
            ("typical_p", 1.0),
            ("repetition_penalty", 1.0),
            ("presence_penalty", 0.0),
            ("frequency_penalty", 0.0),
        )
    }
    for name in ("top_p", "typical_p"):
        violations.unless(0 < values[name] <= 1, name, f"is {values[name]:g}; a number above 0 and up to 1 is accepted")
    for name, (least, most) in {
        "temperature": (0.0, MAX_TEMPERATURE),
        "min_p": (0.0, 1.0),
        "repetition_penalty": REPETITION_PENALTIES,
        "presence_penalty": (-MAX_PENALTY, MAX_PENALTY),
        "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY),
    }.items():
        # A float on the wire: 0.01 arrives as 0.00999999977.
        accepted = least - 1e-6 <= values[name] <= most
        violations.unless(accepted, name, f"is {values[name]:g}; a number from {least:g} to {most:g} is accepted")
    violations.unless(
        0 <= parameters.top_k <= model.vocab_size,
        "top_k",
        f"is {parameters.top_k}; 0 (no cut) to the vocabulary's {model.vocab_size} is accepted",
    )
    return values


def _check_lists(parameters: pb.SamplingParameters, model: ModelInfo, violations: Violations) -> None:
    _check_texts("stop", parameters.stop, MAX_STOPS, violations)
    _check_texts("bad_words", parameters.bad_words, MAX_BAD_WORDS, violations)
    count = len(parameters.stop_token_ids)
    violations.unless(
        count <= MAX_STOP_TOKEN_IDS,
        "stop_token_ids",
        f"has {count} ids; at most {MAX_STOP_TOKEN_IDS} are accepted",
    )
    for index, token in enumerate(parameters.stop_token_ids[:MAX_STOP_TOKEN_IDS]):
        violations.unless(token < model.vocab_size, f"stop_token_ids[{index}]", _outside(token, model))
    count = len(parameters.logit_bias)
    violations.unless(
        count <= MAX_BIASED_TOKENS, "logit_bias", f"has {count} entries; at most {MAX_BIASED_TOKENS} are accepted"
    )
    if count > MAX_BIASED_TOKENS:
        return
    for token, bias in parameters.logit_bias.items():
        violations.unless(token < model.vocab_size, f"logit_bias[{token}]", _outside(token, model))
        violations.unless(
            -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS,
            f"logit_bias[{token}]",
            f"is {bias:g}; a number from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g} is accepted",
        )


def _outside(token: int, model: ModelInfo) -> str:
    return f"is outside the vocabulary: {token}; ids from 0 to {model.vocab_size - 1} are accepted"


def _check_texts(name: str, texts: Sequence[str], most: int, violations: Violations) -> None:
    violations.unless(len(texts) <= most, name, f"has {len(texts)} texts; at most {most} are accepted")
    for index, text in enumerate(texts[:most]):
        violations.unless(
            1 <= len(text) <= MAX_WORD_CHARACTERS,
            f"{name}[{index}]",
            f"has {len(text)} characters; 1 to {MAX_WORD_CHARACTERS} are accepted",
        )


def _bad_words(words: Sequence[str], tokenizer: TextProcessor | None) -> list[list[int]]:
    """Token sequences of each word as it stands at a text's beginning, within one, and there after a space."""
    if not words:
        return []
    if tokenizer is None:
        raise FailedPrecondition(
            "the base model brings no tokenizer, so bad_words cannot be turned into tokens; use logit_bias",
            reason="TOKENIZER_MISSING",
        )
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        found[tuple(tokenizer.encode_plain(word))] = None
        for text in (word, f" {word.lstrip()}"):
            found[tuple(tokenizer.encode_following(text))] = None
    return [list(ids) for ids in found if ids]
