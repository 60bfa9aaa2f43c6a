"""Generations as they come: iterators of chunks that end the sequence on the server when they are closed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from graftwork.errors import APIError
from graftwork.requests.sampling import SamplingOptions
from graftwork.responses.collector import Collector
from graftwork.transport.async_transport import AsyncServerStream, AsyncTransport
from graftwork.transport.calls import Streaming
from graftwork.transport.sync_transport import ServerStream, Transport
from graftwork.types import Generation, GenerationChunk

TransportT = TypeVar("TransportT", Transport, AsyncTransport)
StreamT = TypeVar("StreamT")


class _Generation(Generic[TransportT, StreamT]):
    """What both kinds of stream know: the call, its attempts, and what has come so far."""

    def __init__(
        self,
        transport: TransportT,
        call: Streaming[Any, GenerationChunk],
        *,
        timeout: float | None,
        options: SamplingOptions,
    ) -> None:
        self._transport: TransportT = transport
        self._call = call
        self._attempts = transport.settings.attempts(retry=True, timeout=timeout)
        self._collector = Collector(
            wants_logprobs=options.get("logprobs") is not None,
            wants_prompt_logprobs=options.get("prompt_logprobs") is not None,
        )
        self._stream: StreamT | None = None
        self._request_id = ""
        self._closed = False


class GenerationStream(_Generation[Transport, ServerStream[GenerationChunk]]):
    """The chunks of one generation; those of several completions come mixed, told apart by index.

    Iterate over it; closing it, or leaving its with block, cancels the call, and the server ends the sequence. The call
    starts with the first chunk asked for, and is sent again after a transient failure only before that chunk came.
    Iterating raises APIError, InternalError among them if the answer was cut short.
    """

    def __iter__(self) -> Iterator[GenerationChunk]:
        return self

    def __next__(self) -> GenerationChunk:
        while not self._closed:
            if self._stream is None:
                self._stream = self._transport.stream(self._call, self._attempts.remaining_s())
                self._request_id = self._stream.request_id
            try:
                return self._collector.add(next(self._stream))
            except StopIteration:
                self.close()
                self._collector.check_whole(self._request_id)
            except APIError as error:
                if self._closed:  # closed by another thread while this one waited
                    break
                if self._collector.started:
                    self.close()
                    raise
                self._stream = None
                time.sleep(self._attempts.delay_after(error))
            except BaseException:
                self.close()  # Ctrl-C while waiting must end the sequence, not leave it running
                raise
        raise StopIteration

    def result(self) -> Generation:
        """Reads what is left and returns the whole generation. Raises APIError."""
        for _ in self:
            pass
        return self._collector.result(self._request_id)

    def close(self) -> None:
        """Ends the generation on the server; does nothing if it has ended."""
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncGenerationStream(_Generation[AsyncTransport, AsyncServerStream[GenerationChunk]]):
    """The chunks of one generation, as GenerationStream, for async for and async with. Awaiting it gives itself."""

    def __await__(self) -> Generator[Any, None, Self]:
        async def itself() -> Self:
            return self

        return itself().__await__()

    def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        return self

    async def __anext__(self) -> GenerationChunk:
        while not self._closed:
            if self._stream is None:
                self._stream = self._transport.stream(self._call, self._attempts.remaining_s())
                self._request_id = self._stream.request_id
            try:
                return self._collector.add(await anext(self._stream))
            except StopAsyncIteration:
                await self.close()
                self._collector.check_whole(self._request_id)
            except APIError as error:
                if self._closed:
                    break
                if self._collector.started:
                    await self.close()
                    raise
                self._stream = None
                await asyncio.sleep(self._attempts.delay_after(error))
            except BaseException:
                closed = self._closed
                await self.close()
                if closed:  # closed by another task: gRPC cancels the read, not this task
                    break
                raise
        raise StopAsyncIteration

    async def result(self) -> Generation:
        """Reads what is left and returns the whole generation. Raises APIError."""
        async for _ in self:
            pass
        return self._collector.result(self._request_id)

    async def close(self) -> None:
        """Ends the generation on the server; does nothing if it has ended."""
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
