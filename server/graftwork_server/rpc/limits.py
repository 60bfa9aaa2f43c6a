"""What a request may ask for: each parameter's range, checked before anything is allocated for it.

Every check names the field as the request has it and says what would be accepted.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from graftwork.v1 import generation_pb2 as pb
from graftwork_server.errors import InvalidArgument, ResourceExhausted, Violation
from graftwork_server.messages import Sampling
from graftwork_server.types import ModelInfo

MAX_TEMPERATURE = 100.0
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
DEFAULT_MAX_TOKENS = 256
MAX_MESSAGES = 4096
RETRY_AFTER_MS = 500
LARGE_TEXT_CHARACTERS = 10_000

T = TypeVar("T")


class Admission:
    """Counts requests that wait or run, and refuses what is over the limit at once instead of letting it wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.admitted = 0
        """Requests in the server now."""

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Holds a place while the block runs. Raises ResourceExhausted (QUEUE_FULL) if there is none."""
        if self.admitted >= self._limit:
            raise ResourceExhausted(
                f"{self._limit} requests wait or run already; send it again later",
                reason="QUEUE_FULL",
                metadata={"retry_after_ms": str(RETRY_AFTER_MS)},
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1


def context_limit(model: ModelInfo) -> int:
    """Tokens that one sequence can have, prompt and completion together."""
    return min(model.context_tokens, model.kv_tokens)


def check_prompt(prompt_ids: Sequence[int], field: str, model: ModelInfo, *, room_for: int) -> None:
    """Raises InvalidArgument unless the prompt has a token, all in the vocabulary, and fits with `room_for` more."""
    if not prompt_ids:
        raise InvalidArgument("the prompt is empty; give at least one token", reason="PROMPT_EMPTY", field=field)
    if max(prompt_ids) >= model.vocab_size:
        position = next(i for i, token in enumerate(prompt_ids) if token >= model.vocab_size)
        raise InvalidArgument(
            f"token id {prompt_ids[position]} at position {position} is outside the vocabulary; "
            f"ids from 0 to {model.vocab_size - 1} are accepted",
            reason="TOKEN_ID_OUT_OF_RANGE",
            field=field,
        )
    most = context_limit(model) - room_for
    if len(prompt_ids) > most:
        raise InvalidArgument(
            f"the input has {len(prompt_ids)} tokens; at most {most} are accepted "
            f"(a context of {context_limit(model)} tokens{', one of them to be generated' if room_for else ''})",
            reason="PROMPT_TOO_LONG",
            field=field,
        )


def sampling_of(parameters: pb.SamplingParameters, prompt_tokens: int, model: ModelInfo) -> Sampling:
    """The parameters with every default filled in. Raises InvalidArgument naming each field that is out of range."""
    wrong: list[Violation] = []

    def check(name: str, accepted: bool, what: str) -> None:
        if not accepted:
            wrong.append(Violation(f"sampling.{name}", what))

    left = context_limit(model) - prompt_tokens
    max_tokens = parameters.max_tokens if parameters.HasField("max_tokens") else min(DEFAULT_MAX_TOKENS, left)
    temperature, top_p, top_k = parameters.temperature, parameters.top_p, parameters.top_k
    if not parameters.HasField("top_p"):
        top_p = 1.0
    logprobs = parameters.logprobs if parameters.HasField("logprobs") else None
    check("max_tokens", max_tokens >= 1, f"is {max_tokens}; it must be at least 1")
    check(
        "max_tokens",
        max_tokens <= left,
        f"is {max_tokens}; the prompt's {prompt_tokens} tokens leave room for at most {left} in the context of "
        f"{context_limit(model)}",
    )
    check(
        "temperature",
        math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE,
        f"is {temperature:g}; a number from 0 to {MAX_TEMPERATURE:g} is accepted",
    )
    check("top_p", 0 < top_p <= 1, f"is {top_p:g}; a number above 0 and up to 1 is accepted")
    check(
        "top_k",
        0 <= top_k <= model.vocab_size,
        f"is {top_k}; 0 (no cut) to the vocabulary's {model.vocab_size} is accepted",
    )
    check(
        "logprobs",
        logprobs is None or 0 <= logprobs <= MAX_LOGPROBS,
        f"is {logprobs}; 0 to {MAX_LOGPROBS} is accepted",
    )
    wrong += _wrong_stops(parameters.stop)
    if wrong:
        raise _invalid(wrong)
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=parameters.seed if parameters.HasField("seed") else secrets.randbits(63),
        ignore_eos=parameters.ignore_eos,
        logprobs=logprobs,
    )


def check_top_logprobs(count: int) -> None:
    """Raises InvalidArgument unless `count` is from 0 to 20."""
    if not 0 <= count <= MAX_LOGPROBS:
        raise _invalid([Violation("top_logprobs", f"is {count}; 0 to {MAX_LOGPROBS} is accepted")])


def check_messages(messages: Sequence[pb.ChatMessage]) -> None:
    """Raises InvalidArgument unless there is a message, not too many, and each has a role."""
    if not messages:
        raise _invalid([Violation("messages", "is empty; give at least one message")])
    if len(messages) > MAX_MESSAGES:
        raise _invalid([Violation("messages", f"has {len(messages)} messages; at most {MAX_MESSAGES} are accepted")])
    wrong = [
        Violation(f"messages[{index}].role", 'is empty; "system", "user" or "assistant" is accepted')
        for index, message in enumerate(messages)
        if not message.role
    ]
    if wrong:
        raise _invalid(wrong)


async def off_loop_if_large(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, in a thread if `size` (characters) is so large that other streams would stutter."""
    return await asyncio.to_thread(work) if size > LARGE_TEXT_CHARACTERS else work()


def _wrong_stops(stops: Sequence[str]) -> list[Violation]:
    if len(stops) > MAX_STOPS:
        return [Violation("sampling.stop", f"has {len(stops)} texts; at most {MAX_STOPS} are accepted")]
    return [
        Violation(f"sampling.stop[{index}]", f"has {len(stop)} characters; 1 to {MAX_STOP_CHARACTERS} are accepted")
        for index, stop in enumerate(stops)
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS
    ]


def _invalid(violations: list[Violation]) -> InvalidArgument:
    message = "; ".join(f"{violation.field} {violation.description}" for violation in violations)
    return InvalidArgument(message, reason="INVALID_PARAMETER", violations=violations)
