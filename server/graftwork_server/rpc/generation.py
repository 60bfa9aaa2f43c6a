"""GenerationService: text in, tokens from the engine, text out.

A request's way: admitted, validated, tokenised, its model resolved and leased, queued in the engine, its tokens turned
into text and streamed. Whatever ends it, leaving the `with` blocks releases sequence, lease and place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any

import grpc

from graftwork.v1 import generation_pb2 as pb
from graftwork.v1.generation_pb2_grpc import GenerationServiceServicer
from graftwork_server.engine.client import EngineClient
from graftwork_server.errors import FailedPrecondition, Internal, InvalidArgument
from graftwork_server.hub.leases import Leases
from graftwork_server.hub.resolver import Resolved, Resolver
from graftwork_server.messages import Sampling, SequenceOutput, TokenLogprobs
from graftwork_server.rpc.limits import (
    Admission,
    check_messages,
    check_prompt,
    check_top_logprobs,
    context_limit,
    off_loop_if_large,
    sampling_of,
)
from graftwork_server.text import IncrementalDetokenizer, TextProcessor

FINISH_REASONS = {"": 0, "stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
TOKEN_TEXT_CACHE = 65_536

Context = grpc.aio.ServicerContext


class GenerationService(GenerationServiceServicer):
    """The base model and every adapter, by name. `text` is None if the model brings no tokenizer."""

    def __init__(
        self,
        engine: EngineClient,
        resolver: Resolver,
        leases: Leases,
        text: TextProcessor | None,
        admission: Admission,
    ) -> None:
        self._engine = engine
        self._resolver = resolver
        self._leases = leases
        self._text = text
        self._admission = admission
        self._token_text = lru_cache(TOKEN_TEXT_CACHE)(text.token_text if text else lambda id: "")

    async def Generate(  # type: ignore[override]  # writes to the context instead of yielding
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Continues a prompt."""
        with self._admission.admit():
            field = request.WhichOneof("prompt") or "prompt"
            prompt_ids = await self._prompt_ids(request, field)
            await self._stream(request.model, prompt_ids, field, request.sampling, pb.GenerateResponse, context)

    async def Chat(  # type: ignore[override]  # writes to the context instead of yielding
        self, request: pb.ChatRequest, context: Context
    ) -> None:
        """Continues a conversation."""
        with self._admission.admit():
            prompt_ids = await self._chat_ids(request.messages)
            await self._stream(request.model, prompt_ids, "messages", request.sampling, pb.ChatResponse, context)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Log probabilities of a given text."""
        with self._admission.admit():
            check_top_logprobs(request.top_logprobs)
            field = request.WhichOneof("input") or "input"
            prompt_ids = await self._prompt_ids(request, field)
            check_prompt(prompt_ids, field, self._engine.model, room_for=0)
            resolved = await self._resolver.resolve(request.model)
            async with self._leases.hold(resolved):
                entries = await self._prompt_logprobs(resolved, prompt_ids, request.top_logprobs)
            return pb.ScoreResponse(
                tokens=[self._logprob(entry) for entry in entries],
                total_logprob=sum(entry.logprob for entry in entries if entry.logprob is not None),
                model=resolved.model,
                version=resolved.version,
            )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Token ids that the other methods would see."""
        if bool(request.text) == bool(request.messages):
            raise InvalidArgument("give exactly one of text and messages", reason="INVALID_PARAMETER", field="text")
        ids = await (self._chat_ids(request.messages) if request.messages else self._text_ids(request.text))
        return pb.TokenizeResponse(
            token_ids=ids,
            tokens=[self._token_text(id) for id in ids],
            context_tokens=context_limit(self._engine.model),
        )

    # ------------------------------------------------------------------------------------------ input

    def _tokenizer(self) -> TextProcessor:
        if self._text is None:
            raise FailedPrecondition(
                "the base model brings no tokenizer; give token_ids instead of text", reason="TOKENIZER_MISSING"
            )
        return self._text

    async def _prompt_ids(self, request: pb.GenerateRequest | pb.ScoreRequest, field: str) -> list[int]:
        if field == "text":
            return await self._text_ids(request.text)
        if field == "token_ids":
            return list(request.token_ids.ids)
        raise InvalidArgument("is empty; give text or token_ids", reason="PROMPT_EMPTY", field=field)

    async def _text_ids(self, text: str) -> list[int]:
        tokenizer = self._tokenizer()
        if not text:
            # A tokenizer may add special tokens even to nothing; the caller surely meant to send something.
            raise InvalidArgument("the text is empty", reason="PROMPT_EMPTY", field="text")
        return await off_loop_if_large(len(text), lambda: tokenizer.encode(text))

    async def _chat_ids(self, messages: Sequence[pb.ChatMessage]) -> list[int]:
        tokenizer = self._tokenizer()
        check_messages(messages)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        size = sum(len(message.content) for message in messages)
        return await off_loop_if_large(size, lambda: tokenizer.encode_chat(turns, add_generation_prompt=True))

    # ------------------------------------------------------------------------------------------ output

    async def _stream(
        self,
        model: str,
        prompt_ids: list[int],
        field: str,
        parameters: pb.SamplingParameters,
        response_type: type[pb.GenerateResponse] | type[pb.ChatResponse],
        context: Context,
    ) -> None:
        check_prompt(prompt_ids, field, self._engine.model, room_for=1)
        sampling = sampling_of(parameters, len(prompt_ids), self._engine.model)
        if parameters.stop:
            self._tokenizer()
        resolved = await self._resolver.resolve(model)
        async with self._leases.hold(resolved):
            detokenizer = IncrementalDetokenizer(self._text, parameters.stop) if self._text else None
            answer = _Answer(
                response_type, resolved, len(prompt_ids), self._logprob, detokenizer, bool(parameters.stop)
            )
            outputs = self._engine.generate(prompt_ids, sampling, resolved.adapter)
            async with aclosing(outputs):
                async for output in outputs:
                    message = answer.message(output)
                    await context.write(message)
                    if message.finish_reason:
                        return
        raise Internal("the engine ended a sequence without saying why", reason="ENGINE_PROTOCOL")

    async def _prompt_logprobs(self, resolved: Resolved, prompt_ids: list[int], top: int) -> list[TokenLogprobs]:
        entries: list[TokenLogprobs] = []
        outputs = self._engine.generate(prompt_ids, Sampling(max_tokens=0), resolved.adapter, top)
        async with aclosing(outputs):
            async for output in outputs:
                entries += output.prompt_logprobs or []
        return entries

    def _logprob(self, entry: TokenLogprobs) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token_id=entry.token_id,
            text=self._token_text(entry.token_id),
            logprob=entry.logprob,
            top=[pb.TopLogprob(token_id=id, text=self._token_text(id), logprob=logprob) for id, logprob in entry.top],
        )


class _Answer:
    """Makes the messages of one stream: text, tokens, and at its ends who answers and what was used."""

    def __init__(
        self,
        response_type: type[Any],
        resolved: Resolved,
        prompt_tokens: int,
        logprob: Callable[[TokenLogprobs], pb.TokenLogprob],
        detokenizer: IncrementalDetokenizer | None,
        has_stops: bool,
    ) -> None:
        self._response_type = response_type
        self._resolved = resolved
        self._prompt_tokens = prompt_tokens
        self._logprob = logprob
        self._detokenizer = detokenizer
        self._has_stops = has_stops
        self._begun = False
        self._tokens = 0

    def message(self, output: SequenceOutput) -> Any:
        """The message for `output`; with a finish reason if the engine or a stop text ended the sequence."""
        text, kept, stopped = self._text_of(output)
        finish = pb.FINISH_REASON_STOP if stopped else FINISH_REASONS[output.finish]
        message = self._response_type(
            text=text,
            token_ids=output.token_ids[:kept],
            logprobs=[self._logprob(entry) for entry in (output.logprobs or ())[:kept]],
            finish_reason=finish,
        )
        if finish or not self._begun:
            message.model, message.version = self._resolved.model, self._resolved.version
        self._begun = True
        self._tokens += kept
        if finish:
            message.usage.prompt_tokens = self._prompt_tokens
            message.usage.completion_tokens = self._tokens
        return message

    def _text_of(self, output: SequenceOutput) -> tuple[str, int, bool]:
        """Text that became certain, how many of the tokens count, and whether a stop text was met."""
        if self._detokenizer is None:
            return "", len(output.token_ids), False
        # One token at a time where a stop text may cut: how many came together is chance, the answer must not be.
        step = 1 if self._has_stops else max(len(output.token_ids), 1)
        text = ""
        for position in range(0, len(output.token_ids), step):
            piece = self._detokenizer.feed(output.token_ids[position : position + step])
            text += piece.text
            if piece.stop is not None:
                return text, position + 1, True
        if output.finish:
            piece = self._detokenizer.finish()
            return text + piece.text, len(output.token_ids), piece.stop is not None
        return text, len(output.token_ids), False
