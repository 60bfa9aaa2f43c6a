"""Calls of GenerationService about tokens: Generate, Chat, Score, Tokenize."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from graftwork import types
from graftwork.requests.fields import build
from graftwork.requests.messages import Messages, Tools, chat_messages, json_text
from graftwork.requests.sampling import SamplingOptions, sampling_parameters
from graftwork.responses import generation as responses
from graftwork.transport.calls import Streaming, Unary
from graftwork.v1 import generation_pb2 as pb

Prompt: TypeAlias = str | Sequence[int]
Prompts: TypeAlias = list[str] | list[list[int]] | tuple[str, ...]
"""Several prompts, each answered by itself."""

GenerateCall: TypeAlias = Streaming[pb.GenerateResponse, types.GenerationChunk]

_SERVICE = "/graftwork.v1.GenerationService/"


def generate(
    model: str,
    prompt: Prompt | Prompts,
    options: SamplingOptions,
    cache_salt: str | None,
    priority: int | None,
    *,
    stream: bool,
) -> GenerateCall | list[GenerateCall]:
    """Generate; of several prompts a call for each. Raises ValueError for several with stream."""
    if not isinstance(prompt, list | tuple) or not prompt or any(isinstance(one, int) for one in prompt):
        return _generate(model, cast("Prompt", prompt), options, cache_salt, priority)
    if stream:
        raise ValueError("stream=True takes one prompt; call it once for each of several")
    return [_generate(model, one, options, cache_salt, priority) for one in cast("Prompts", prompt)]


def _generate(
    model: str, prompt: Prompt, options: SamplingOptions, cache_salt: str | None, priority: int | None
) -> GenerateCall:
    request = build(
        pb.GenerateRequest,
        {"text": "prompt"},
        model=model,
        sampling=sampling_parameters(options),
        cache_salt=cache_salt or "",
        priority=priority or 0,
        **_prompt(prompt),
    )
    return Streaming(_SERVICE + "Generate", request, pb.GenerateResponse, responses.chunk)


def _prompt(prompt: Prompt, called: str = "prompt") -> dict[str, Any]:
    """A prompt as the field that it is; an empty list is still the choice of token ids."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise TypeError(f"{called} is {prompt!r:.60}; a text or a list of token ids is accepted")
    return {"token_ids": build(pb.TokenIds, {"ids": called}, ids=prompt)}


def chat(
    model: str,
    messages: Messages,
    options: SamplingOptions,
    tools: Tools | None,
    continue_final_message: bool,
    cache_salt: str | None,
    priority: int | None,
) -> Streaming[pb.ChatResponse, types.GenerationChunk]:
    """Chat. Raises ValueError for tools or tool calls that JSON cannot hold."""
    request = build(
        pb.ChatRequest,
        model=model,
        messages=chat_messages(messages),
        sampling=sampling_parameters(options),
        tools_json=json_text(tools),
        continue_final_message=continue_final_message,
        cache_salt=cache_salt or "",
        priority=priority or 0,
    )
    return Streaming(_SERVICE + "Chat", request, pb.ChatResponse, responses.chunk)


def score(model: str, prompt: Prompt, top_logprobs: int) -> Unary[pb.ScoreResponse, types.Score]:
    """Score."""
    request = build(pb.ScoreRequest, model=model, top_logprobs=top_logprobs, **_prompt(prompt, "text"))
    return Unary(_SERVICE + "Score", request, pb.ScoreResponse, responses.score, retry=True)


def tokenize(
    given: str | Messages, model: str, tools: Tools | None, continue_final_message: bool
) -> Unary[pb.TokenizeResponse, types.Tokenization]:
    """Tokenize, of a text or of a conversation."""
    request = build(
        pb.TokenizeRequest,
        text=given if isinstance(given, str) else "",
        messages=() if isinstance(given, str) else chat_messages(given),
        model=model,
        tools_json=json_text(tools),
        continue_final_message=continue_final_message,
    )
    return Unary(_SERVICE + "Tokenize", request, pb.TokenizeResponse, responses.tokenization, retry=True)
