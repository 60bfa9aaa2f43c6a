"""GenerationService: text in, tokens from the engine, text out.

A request's way: admitted, validated, tokenised, its model resolved and leased, queued in the engine, its tokens turned
into text and streamed. Whatever ends it, leaving the `with` blocks releases sequence, lease and place.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import grpc
import msgspec

from graftwork.v1 import generation_pb2 as pb
from graftwork.v1.generation_pb2_grpc import GenerationServiceServicer
from graftwork_server.errors import FailedPrecondition, Internal, InvalidArgument, Violation
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.front.rpc.generation import pooled
from graftwork_server.front.rpc.generation.chat import chat_ids
from graftwork_server.front.rpc.generation.completions import BestOf, Completion
from graftwork_server.front.rpc.generation.samples import Samples, samplings_of
from graftwork_server.front.rpc.generation.sampling import (
    SampleCounts,
    prompt_logprobs_of,
    sample_counts,
    sampling_of,
)
from graftwork_server.front.rpc.limits import (
    SequenceLimit,
    Violations,
    check_prompt,
    check_prompt_logprobs,
    check_scheduling,
    context_limit,
    in_thread_if_large,
    invalid,
)
from graftwork_server.hub.leases import Leases
from graftwork_server.hub.resolver import Resolved, Resolver
from graftwork_server.logs import note, note_first_token
from graftwork_server.names import BASE
from graftwork_server.text import IncrementalDetokenizer, TextProcessor
from graftwork_server.text.strangers.isolated_text import IsolatedTexts
from graftwork_server.types import require_generation
from graftwork_server.wire.engine import Pool, Sampling, SequenceOutput, TokenLogprobs

Context = grpc.aio.ServicerContext


@dataclass(frozen=True)
class _Prompt:
    """What a sequence continues. field: where the request has it. echo: its text, for those who want it back.
    joined: the sequence's text goes on in it, and is no message of its own."""

    ids: list[int]
    field: str
    echo: str = ""
    joined: bool = True


class GenerationService(GenerationServiceServicer):
    """The base model and every adapter, by name."""

    def __init__(
        self,
        engine: EngineClient,
        resolver: Resolver,
        leases: Leases,
        texts: IsolatedTexts,
        sequence_limit: SequenceLimit,
    ) -> None:
        self._engine = engine
        self._resolver = resolver
        self._leases = leases
        self._texts = texts
        self._sequence_limit = sequence_limit

    async def Generate(  # type: ignore[override]  # writes to the context instead of yielding
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Continues a prompt."""
        require_generation(self._engine.model, "Generate")
        with self._sequence_limit.hold():
            async with self._held(request.model) as (resolved, text):
                field = request.WhichOneof("prompt") or "prompt"
                ids = await self._prompt_ids(request, field, text)
                check_prompt(ids, field, self._engine.model, room_for=1)  # before it is turned into text
                echo = request.text or (_needed(text).decode(ids) if request.sampling.echo else "")
                prompt = _Prompt(ids, field, echo)
                await self._stream(resolved, text, prompt, request, pb.GenerateResponse, context)

    async def Chat(  # type: ignore[override]  # writes to the context instead of yielding
        self, request: pb.ChatRequest, context: Context
    ) -> None:
        """Continues a conversation."""
        require_generation(self._engine.model, "Chat")
        with self._sequence_limit.hold():
            async with self._held(request.model) as (resolved, text):
                if request.sampling.echo and not request.continue_final_message:
                    what = "has nothing to repeat in Chat but a message that is continued; set continue_final_message"
                    raise invalid([Violation("sampling.echo", what)])
                ids = await chat_ids(request, _needed(text), self._texts)
                last = request.messages[-1].content
                prompt = _Prompt(ids, "messages", last, joined=request.continue_final_message)
                await self._stream(resolved, text, prompt, request, pb.ChatResponse, context)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Log probabilities of a given text."""
        require_generation(self._engine.model, "Score")
        with self._sequence_limit.hold():
            async with self._held(request.model) as (resolved, text):
                field = request.WhichOneof("input") or "input"
                prompt_ids = await self._prompt_ids(request, field, text)
                violations = Violations()
                check_prompt_logprobs(request.top_logprobs, "top_logprobs", len(prompt_ids), violations)
                violations.raise_if_any()
                check_prompt(prompt_ids, field, self._engine.model, room_for=0)
                note(prompt_tokens=len(prompt_ids))
                entries = await self._prompt_logprobs(resolved, prompt_ids, request.top_logprobs)
            return pb.ScoreResponse(
                tokens=[_logprob(entry, text) for entry in entries],
                total_logprob=sum(entry.logprob for entry in entries if entry.logprob is not None),
                model=resolved.model,
                version=resolved.version,
            )

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        """Labels of texts."""
        with self._sequence_limit.hold():
            async with self._held(request.model) as (resolved, text):
                rows = await pooled.rows_of(request.inputs, text, self._engine.model, self._texts)
                with self._sequence_limit.hold(pooled.places(rows) - 1):
                    answers = await pooled.run(self._engine, rows, resolved, Pool("classify"))
            return await pooled.classify_response(answers, rows, resolved)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Vectors of texts."""
        with self._sequence_limit.hold():
            async with self._held(request.model) as (resolved, text):
                pool = pooled.embed_pool(request, self._engine.model, resolved.adapter)
                rows = await pooled.rows_of(request.inputs, text, self._engine.model, self._texts)
                with self._sequence_limit.hold(pooled.places(rows) - 1):
                    answers = await pooled.run(self._engine, rows, resolved, pool)
            return await pooled.embed_response(answers, rows, pool, resolved)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Token ids that the other methods would see."""
        if bool(request.text) == bool(request.messages):
            raise InvalidArgument("give exactly one of text and messages", reason="INVALID_PARAMETER", field="text")
        async with self._held(request.model or BASE) as (_, text):
            tokenizer = _needed(text)
            if request.messages:
                ids = await chat_ids(request, tokenizer, self._texts)
            else:
                ids = await self._text_ids(request.text, tokenizer)
            return await in_thread_if_large(
                len(ids),
                lambda: pb.TokenizeResponse(
                    token_ids=ids,
                    tokens=[tokenizer.token_text(id) for id in ids],
                    context_tokens=context_limit(self._engine.model),
                ),
            )

    @asynccontextmanager
    async def _held(self, model: str) -> AsyncIterator[tuple[Resolved, TextProcessor | None]]:
        """Who answers, kept from being removed while the block runs, and whose tokens it speaks."""
        resolved = await self._resolver.resolve(model)
        note(model=resolved.model)
        if resolved.version:
            note(version=resolved.version)
        async with self._leases.hold(resolved):
            yield resolved, await text_of(self._texts, resolved)

    async def _prompt_ids(
        self, request: pb.GenerateRequest | pb.ScoreRequest, field: str, text: TextProcessor | None
    ) -> list[int]:
        if field == "text":
            return await self._text_ids(request.text, _needed(text))
        if field == "token_ids":
            return list(request.token_ids.ids)
        raise InvalidArgument("is empty; give text or token_ids", reason="PROMPT_EMPTY", field=field)

    async def _text_ids(self, text: str, tokenizer: TextProcessor) -> list[int]:
        if not text:
            # A tokenizer may add special tokens even to nothing; the caller surely meant to send something.
            raise InvalidArgument("the text is empty", reason="PROMPT_EMPTY", field="text")
        return await self._texts.run(tokenizer, len(text), lambda tokenizer: tokenizer.encode(text))

    # ------------------------------------------------------------------------------------------ output

    async def _stream(
        self,
        resolved: Resolved,
        text: TextProcessor | None,
        prompt: _Prompt,
        request: pb.GenerateRequest | pb.ChatRequest,
        response_type: type[pb.GenerateResponse] | type[pb.ChatResponse],
        context: Context,
    ) -> None:
        parameters = request.sampling
        check_prompt(prompt.ids, prompt.field, self._engine.model, room_for=1)
        violations = Violations()
        check_scheduling(request.cache_salt, request.priority, violations)
        counts = sample_counts(parameters, self._sequence_limit.limit, violations)
        top = prompt_logprobs_of(parameters, len(prompt.ids), violations)
        sampling = await self._sampling(parameters, len(prompt.ids), text, violations)
        ends = self._ends_beside_the_base(resolved, text)
        if ends and not sampling.ignore_eos:
            sampling = msgspec.structs.replace(sampling, stop_token_ids=[*sampling.stop_token_ids, *ends])
        if parameters.stop or parameters.echo:
            _needed(text)

        def start(one: Sampling, first: bool) -> AsyncGenerator[SequenceOutput, None]:
            return self._engine.generate(
                prompt.ids,
                one,
                resolved.adapter,
                top if first else None,
                cache_salt=request.cache_salt,
                priority=request.priority,
            )

        before = prompt.ids if prompt.joined else ()
        completions = [
            Completion(
                response_type,
                resolved,
                sampling,
                partial(_logprob, text=text),
                IncrementalDetokenizer(text, parameters.stop, before=before) if text else None,
                index=index,
                echo=prompt.echo if parameters.echo else "",
                has_stops=bool(parameters.stop),
                shows_logprobs=sampling.logprobs is not None,
                scored=counts.scored,
            )
            for index in range(counts.sampled)
        ]
        if counts.scored and sampling.logprobs is None:
            sampling = msgspec.structs.replace(sampling, logprobs=0)
        with self._sequence_limit.hold(counts.sampled - 1):
            async with Samples(start, samplings_of(sampling, counts.sampled)) as samples:
                try:
                    await _write(samples, completions, counts, len(prompt.ids), context)
                finally:
                    note(completion_tokens=sum(completion.tokens for completion in completions))

    async def _sampling(
        self, parameters: pb.SamplingParameters, prompt_tokens: int, text: TextProcessor | None, violations: Violations
    ) -> Sampling:
        def made(text: TextProcessor | None) -> Sampling:
            return sampling_of(parameters, prompt_tokens, self._engine.model, text, violations)

        if text is None or not parameters.bad_words:  # the only ones that need tokens of a text
            return made(text)
        return await self._texts.run(text, 0, made, "sampling.bad_words")

    def _ends_beside_the_base(self, resolved: Resolved, text: TextProcessor | None) -> list[int]:
        """Tokens that end the texts of who answers: those of its version, and its own tokenizer's, which versions that
        are older than the list of theirs do not name."""
        ends = set(resolved.adapter.end_token_ids if resolved.adapter else ())
        if text is not None and text is not self._texts.base and text.eos_token_id is not None:
            ends.add(text.eos_token_id)
        return sorted(ends - set(self._engine.model.eos_token_ids))

    async def _prompt_logprobs(self, resolved: Resolved, prompt_ids: list[int], top: int) -> list[TokenLogprobs]:
        entries: list[TokenLogprobs] = []
        outputs = self._engine.generate(prompt_ids, Sampling(max_tokens=0), resolved.adapter, top)
        async with aclosing(outputs):
            async for output in outputs:
                entries += output.prompt_logprobs or []
        return entries


async def _write(
    samples: Samples,
    completions: list[Completion],
    counts: SampleCounts,
    prompt_tokens: int,
    context: Context,
) -> None:
    """Sends the completions' messages, as they come or, if they are ranked, at the end."""
    ranking = BestOf() if counts.scored else None
    prompt_logprobs: list[pb.TokenLogprob] = []
    usage = pb.Usage(prompt_tokens=prompt_tokens)
    note(prompt_tokens=prompt_tokens)
    async for index, output in samples:
        note_first_token()
        completion = completions[index]
        if index == 0:
            usage.cached_tokens += output.cached_tokens
        if completion.ended:
            continue
        message = completion.message(output)
        prompt_logprobs += [completion.logprob(entry) for entry in output.prompt_logprobs or ()]
        if completion.ended:
            samples.end(index)
            usage.completion_tokens += completion.tokens
        done = all(completion.ended for completion in completions)
        if ranking is not None:
            ranking.keep(message)
        else:
            if index == 0 and prompt_logprobs:
                message.prompt_logprobs.extend(prompt_logprobs)
                prompt_logprobs.clear()
            if done:
                message.usage.CopyFrom(usage)
            await context.write(message)
        if done:
            break
    else:
        raise Internal("the engine ended a sequence without saying why", reason="ENGINE_PROTOCOL")
    if ranking is not None:
        messages = list(ranking.best(counts.returned))
        messages[0].prompt_logprobs.extend(prompt_logprobs)
        messages[-1].usage.CopyFrom(usage)
        for message in messages:
            await context.write(message)


async def text_of(texts: IsolatedTexts, resolved: Resolved) -> TextProcessor | None:
    """Tokenizer and template of who answers. Raises FailedPrecondition for an adapter's that cannot be used."""
    if resolved.adapter is None:
        return texts.base
    return await texts.of(resolved.adapter.digest, resolved.adapter.path)


def _needed(text: TextProcessor | None) -> TextProcessor:
    if text is None:
        raise FailedPrecondition(
            "the base model brings no tokenizer; give token_ids instead of text", reason="TOKENIZER_MISSING"
        )
    return text


def _logprob(entry: TokenLogprobs, text: TextProcessor | None) -> pb.TokenLogprob:
    def shown(id: int) -> str:
        return text.token_text(id) if text else ""

    return pb.TokenLogprob(
        token_id=entry.token_id,
        text=shown(entry.token_id),
        logprob=entry.logprob,
        top=[pb.TopLogprob(token_id=id, text=shown(id), logprob=logprob) for id, logprob in entry.top],
    )
