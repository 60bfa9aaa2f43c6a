"""What a request may ask for: each parameter's range, checked before anything is allocated for it.

Every check names the field as the request has it and says what would be accepted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from graftwork.v1 import generation_pb2 as pb
from graftwork_server.errors import InvalidArgument, ResourceExhausted, Violation
from graftwork_server.types import ModelInfo

MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 1 << 20
"""Log probabilities of one prompt, alternatives counted: they are sent in one message."""
MAX_MESSAGES = 4096
MAX_SALT_CHARACTERS = 256
MAX_PRIORITY = 100
RETRY_AFTER_MS = 500
LARGE_TEXT_CHARACTERS = 10_000

T = TypeVar("T")


class SequenceLimit:
    """Counts sequences that wait or run, and refuses what is over the limit at once instead of letting it wait."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        """Sequences in the server now."""

    @contextmanager
    def hold(self, sequences: int = 1) -> Iterator[None]:
        """Holds places while the block runs. Raises ResourceExhausted (QUEUE_FULL) if there are too few."""
        if self.held + sequences > self.limit:
            raise ResourceExhausted(
                f"{self.held} sequences wait or run, {self.limit} may; send it again later",
                reason="QUEUE_FULL",
                metadata={"retry_after_ms": str(RETRY_AFTER_MS)},
            )
        self.held += sequences
        try:
            yield
        finally:
            self.held -= sequences


def context_limit(model: ModelInfo) -> int:
    """Tokens that one sequence can have, prompt and completion together."""
    return min(model.context_tokens, model.kv_tokens) if model.generates else model.context_tokens


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


def check_prompt_logprobs(top: int, field: str, prompt_tokens: int, violations: Violations) -> None:
    """Notes a `top` that is not from 0 to 20, or whose answer for so many tokens fits no message."""
    if not 0 <= top <= MAX_LOGPROBS:
        violations.note(field, f"is {top}; 0 to {MAX_LOGPROBS} is accepted")
    elif prompt_tokens * (1 + top) > MAX_PROMPT_LOGPROBS:
        most = MAX_PROMPT_LOGPROBS // prompt_tokens - 1
        accepted = f"at most {most} is accepted" if most >= 0 else f"at most {MAX_PROMPT_LOGPROBS} tokens are accepted"
        violations.note(field, f"is {top} for each of {prompt_tokens} tokens; {accepted}")


def check_scheduling(cache_salt: str, priority: int, violations: Violations) -> None:
    """Notes a salt that is too long and a priority out of its range."""
    if len(cache_salt) > MAX_SALT_CHARACTERS:
        violations.note("cache_salt", f"has {len(cache_salt)} characters; at most {MAX_SALT_CHARACTERS} are accepted")
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        violations.note("priority", f"is {priority}; {-MAX_PRIORITY} to {MAX_PRIORITY} is accepted")


def check_messages(messages: Sequence[pb.ChatMessage]) -> None:
    """Raises InvalidArgument unless there is a message, not too many, and each has a role."""
    if not messages:
        raise InvalidArgument("is empty; give at least one message", reason="MESSAGES_EMPTY", field="messages")
    if len(messages) > MAX_MESSAGES:
        raise invalid([Violation("messages", f"has {len(messages)} messages; at most {MAX_MESSAGES} are accepted")])
    violations = [
        Violation(f"messages[{index}].role", 'is empty; "system", "user" or "assistant" is accepted')
        for index, message in enumerate(messages)
        if not message.role
    ]
    if violations:
        raise invalid(violations)


async def in_thread_if_large(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, in a thread if `size` (characters) is so large that other streams would stutter."""
    return await asyncio.to_thread(work) if size > LARGE_TEXT_CHARACTERS else work()


def invalid(violations: Sequence[Violation]) -> InvalidArgument:
    """The error that names all of `violations`."""
    message = "; ".join(f"{violation.field} {violation.description}" for violation in violations)
    return InvalidArgument(message, reason="INVALID_PARAMETER", violations=violations)


class Violations:
    """Collects what is wrong, so that a caller learns of all of it at once."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def note(self, field: str, what: str) -> None:
        """Notes that `field` is wrong and what would be accepted."""
        self._violations.append(Violation(field, what))

    def unless(self, accepted: bool, name: str, what: str) -> None:
        """Notes it of the field `sampling.{name}` if that is not accepted."""
        if not accepted:
            self.note(f"sampling.{name}", what)

    def raise_if_any(self) -> None:
        """Raises InvalidArgument with everything noted."""
        if self._violations:
            raise invalid(self._violations)
