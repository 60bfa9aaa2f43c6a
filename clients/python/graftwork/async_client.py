"""The asyncio client: Client with await in front."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from graftwork.client import AT_ONCE
from graftwork.requests import generation as generation_requests
from graftwork.requests import pooling as pooling_requests
from graftwork.requests.generation import GenerateCall, Prompt, Prompts
from graftwork.requests.messages import Messages, Tools
from graftwork.requests.pooling import TextInput
from graftwork.requests.sampling import SamplingOptions
from graftwork.resources.adapters import AsyncAdapters
from graftwork.resources.datasets import AsyncDatasets
from graftwork.resources.server import AsyncServer
from graftwork.resources.strategies import AsyncStrategies
from graftwork.resources.tuning import AsyncTuning
from graftwork.streams import AsyncGenerationStream
from graftwork.transport.async_transport import AsyncTransport
from graftwork.transport.calls import Streaming
from graftwork.transport.settings import DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT_S, Settings
from graftwork.types import (
    ClassificationResult,
    EmbeddingResult,
    Generation,
    GenerationChunk,
    Pooling,
    Score,
    Tokenization,
)


class AsyncClient:
    """As Client, for asyncio; arguments, return values and errors are the same. Belongs to one event loop.

    Lists are for async for: async for adapter in client.adapters.list().
    """

    adapters: AsyncAdapters
    datasets: AsyncDatasets
    server: AsyncServer
    strategies: AsyncStrategies
    tuning: AsyncTuning

    def __init__(
        self,
        *,
        address: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        self._transport = AsyncTransport(Settings.of(address, timeout, max_retries))
        self.adapters = AsyncAdapters(self._transport)
        self.datasets = AsyncDatasets(self._transport)
        self.server = AsyncServer(self._transport)
        self.strategies = AsyncStrategies(self._transport)
        self.tuning = AsyncTuning(self._transport)

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return self._transport.settings.address

    @overload
    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Coroutine[Any, Any, Generation]: ...
    @overload
    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncGenerationStream: ...
    @overload
    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: bool,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Awaitable[Generation | AsyncGenerationStream]: ...
    @overload
    def generate(
        self,
        model: str,
        prompt: Prompts,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Coroutine[Any, Any, list[Generation]]: ...
    def generate(
        self,
        model: str,
        prompt: Prompt | Prompts,
        *,
        stream: bool = False,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Awaitable[Generation | AsyncGenerationStream | list[Generation]]:
        """As Client.generate, to be awaited; with stream=True, for async for or async with, awaited or not."""
        call = generation_requests.generate(model, prompt, options, cache_salt, priority, stream=stream)
        if isinstance(call, list):
            return self._answer_all(call, timeout, options)
        return self._answer(call, stream, timeout, options)

    @overload
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Coroutine[Any, Any, Generation]: ...
    @overload
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncGenerationStream: ...
    @overload
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: bool,
        timeout: float | None = None,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Awaitable[Generation | AsyncGenerationStream]: ...
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: bool = False,
        timeout: float | None = None,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Awaitable[Generation | AsyncGenerationStream]:
        """As Client.chat, to be awaited; with stream=True, for async for or async with, awaited or not."""
        call = generation_requests.chat(model, messages, options, tools, continue_final_message, cache_salt, priority)
        return self._answer(call, stream, timeout, options)

    def _answer(
        self, call: Streaming[Any, GenerationChunk], stream: bool, timeout: float | None, options: SamplingOptions
    ) -> Awaitable[Generation | AsyncGenerationStream]:
        running = AsyncGenerationStream(self._transport, call, timeout=timeout, options=options)
        return running if stream else running.result()

    async def _answer_all(
        self, calls: list[GenerateCall], timeout: float | None, options: SamplingOptions
    ) -> list[Generation]:
        running = [AsyncGenerationStream(self._transport, call, timeout=timeout, options=options) for call in calls]
        at_once = asyncio.Semaphore(AT_ONCE)

        async def result(stream: AsyncGenerationStream) -> Generation:
            async with at_once:
                return await stream.result()

        tasks = [asyncio.create_task(result(stream)) for stream in running]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # after an error none of the others goes on
                task.cancel()

    async def score(self, model: str, text: Prompt, *, top_logprobs: int = 0, timeout: float | None = None) -> Score:
        """As Client.score."""
        return await self._transport.unary(generation_requests.score(model, text, top_logprobs), timeout)

    async def classify(
        self, model: str, inputs: TextInput | Sequence[TextInput], *, timeout: float | None = None
    ) -> ClassificationResult:
        """As Client.classify."""
        return await self._transport.unary(pooling_requests.classify(model, inputs), timeout)

    async def embed(
        self,
        model: str,
        inputs: TextInput | Sequence[TextInput],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        timeout: float | None = None,
    ) -> EmbeddingResult:
        """As Client.embed."""
        return await self._transport.unary(
            pooling_requests.embed(model, inputs, pooling, normalize, dimensions), timeout
        )

    async def tokenize(
        self,
        text: str | Messages,
        *,
        model: str = "base",
        tools: Tools | None = None,
        continue_final_message: bool = False,
        timeout: float | None = None,
    ) -> Tokenization:
        """As Client.tokenize."""
        call = generation_requests.tokenize(text, model, tools, continue_final_message)
        return await self._transport.unary(call, timeout)

    async def close(self) -> None:
        """Closes the connection; calls in flight are cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
