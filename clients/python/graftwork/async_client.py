"""The asyncio client: Client with await in front."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from graftwork import requests
from graftwork.async_transport import AsyncTransport
from graftwork.calls import Streaming
from graftwork.requests import Messages, Prompt, SamplingOptions, TextInput, Tools
from graftwork.resources.adapters import AsyncAdapters
from graftwork.resources.datasets import AsyncDatasets
from graftwork.resources.server import AsyncServer
from graftwork.resources.strategies import AsyncStrategies
from graftwork.resources.tuning import AsyncTuning
from graftwork.streams import AsyncGenerationStream
from graftwork.transport import DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT_S, Settings
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
    async def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    async def generate(
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
    async def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: bool,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | AsyncGenerationStream: ...
    async def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: bool = False,
        timeout: float | None = None,
        cache_salt: str | None = None,
        priority: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | AsyncGenerationStream:
        """As Client.generate; with stream=True, await it for an iterator for async for."""
        call = requests.generate(model, prompt, options, cache_salt, priority)
        return await self._answer(call, stream, timeout, options)

    @overload
    async def chat(
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
    ) -> Generation: ...
    @overload
    async def chat(
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
    async def chat(
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
    ) -> Generation | AsyncGenerationStream: ...
    async def chat(
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
    ) -> Generation | AsyncGenerationStream:
        """As Client.chat; with stream=True, await it for an iterator for async for."""
        call = requests.chat(model, messages, options, tools, continue_final_message, cache_salt, priority)
        return await self._answer(call, stream, timeout, options)

    async def _answer(
        self, call: Streaming[Any, GenerationChunk], stream: bool, timeout: float | None, options: SamplingOptions
    ) -> Generation | AsyncGenerationStream:
        running = AsyncGenerationStream(self._transport, call, timeout=timeout, options=options)
        return running if stream else await running.result()

    async def score(self, model: str, text: Prompt, *, top_logprobs: int = 0, timeout: float | None = None) -> Score:
        """As Client.score."""
        return await self._transport.unary(requests.score(model, text, top_logprobs), timeout)

    async def classify(
        self, model: str, inputs: TextInput | Sequence[TextInput], *, timeout: float | None = None
    ) -> ClassificationResult:
        """As Client.classify."""
        return await self._transport.unary(requests.classify(model, inputs), timeout)

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
        return await self._transport.unary(requests.embed(model, inputs, pooling, normalize, dimensions), timeout)

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
        call = requests.tokenize(text, model, tools, continue_final_message)
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
