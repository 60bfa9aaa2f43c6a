"""What generating, scoring and tokenizing return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

FinishReason: TypeAlias = Literal["stop", "length"]


class Message(TypedDict):
    """One message of a conversation: role is "system", "user" or "assistant", or another that the template knows.

    content: a text, or a list of parts {"type": "text", "text": ...}, which are joined as they are.
    tool_calls: what the assistant called, as the template reads it. tool_call_id: the call that a message answers.
    name: who speaks, such as a tool.
    """

    role: str
    content: str | Sequence[Mapping[str, Any]]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class TopLogprob:
    """One alternative at a position; logprob is the natural logarithm of its probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log probability under the model's own distribution (temperature 1).

    logprob is None for the first token of a scored text, which nothing precedes. top holds the most likely tokens at
    this position, best first, as many as were asked for.
    """

    token_id: int
    text: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of one request; completion_tokens includes the end-of-sequence token.

    cached_tokens: those of the prompt that the server had computed before; with n or best_of, for the first completion.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class GenerationChunk:
    """One piece of a streamed generation.

    text is what became certain with this piece; a completion's pieces together are its whole text. logprobs has one
    entry per token of this piece if asked for. finish_reason is set on a completion's last piece, usage on the stream's
    last one. model and version say who answers (version 0: the base model). index: which completion of several this
    belongs to. score: with best_of, the mean log probability of its tokens, on its last piece. prompt_logprobs: of the
    prompt's tokens, on one piece, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    usage: Usage | None
    model: str
    version: int
    index: int = 0
    score: float | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One of the completions of a request.

    finish_reason: "stop" (end-of-sequence or stop token, stop text, the end of a grammar) or "length" (max_tokens).
    logprobs: one entry per token, None if not asked for. score: with best_of, the mean log probability of its tokens.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    score: float | None


@dataclass(frozen=True)
class Generation:
    """A whole generation.

    text, token_ids, finish_reason and logprobs are those of the first completion; completions has all n of them, with
    best_of the best first. prompt_logprobs: one entry per prompt token, None if not asked for. model and version: who
    answered (version 0: the base model).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    usage: Usage
    model: str
    version: int
    completions: tuple[Completion, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Score:
    """Log probability of every token of a text, and their sum."""

    tokens: tuple[TokenLogprob, ...]
    total_logprob: float
    model: str
    version: int


@dataclass(frozen=True)
class Tokenization:
    """Token ids of a text or conversation, each token as text, and how many tokens the base model's context holds."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    context_tokens: int
