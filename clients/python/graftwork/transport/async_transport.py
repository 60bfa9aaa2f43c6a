"""Carries calls out over an asyncio channel."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, Self

import grpc
import grpc.aio

from graftwork.transport.calls import Message, R, Streaming, T, Unary, Upload, serializers
from graftwork.transport.request_ids import Metadata, call_metadata, new_request_id
from graftwork.transport.retries import Attempts
from graftwork.transport.settings import Settings
from graftwork.transport.status import api_error
from graftwork.transport.sync_transport import Outgoing


class AsyncServerStream(Generic[T]):
    """One attempt at a streaming call: an asynchronous iterator of parsed messages that raises APIError.

    request_id: the id that was sent with it.
    """

    def __init__(self, call: Any, parse: Callable[[Any], T], request_id: str) -> None:
        self._call = call
        self._messages: AsyncIterator[Any] = call.__aiter__()
        self._parse = parse
        self.request_id = request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return self._parse(await self._messages.__anext__())
        except grpc.RpcError as error:
            raise api_error(error, self.request_id) from error

    def cancel(self) -> None:
        """Ends the call on the server too; does nothing if it has ended."""
        self._call.cancel()


class AsyncTransport:
    """An asyncio channel, opened in the event loop of the first call."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._opened: grpc.aio.Channel | None = None

    @property
    def _channel(self) -> grpc.aio.Channel:
        # Not in __init__: a client may be made before the loop runs, and a channel belongs to one loop.
        if self._opened is None:
            options = self.settings.channel_options()
            self._opened = grpc.aio.insecure_channel(self.settings.address, options=options)
        return self._opened

    async def close(self) -> None:
        """Closes the channel; calls in flight end as cancelled."""
        if self._opened is not None:
            await self._opened.close(None)

    async def unary(self, call: Unary[R, T], timeout: float | None = None) -> T:
        """Carries a call out. Raises APIError."""
        method = self._channel.unary_unary(call.path, **serializers(call.response))

        async def attempt(seconds: float, metadata: Metadata) -> T:
            return call.parse(await method(call.request, timeout=seconds, metadata=metadata))

        return await self._retrying(attempt, self.settings.attempts(retry=call.retry, timeout=timeout))

    async def upload(self, call: Upload[R, T], timeout: float | None = None) -> T:
        """Carries an upload out; files are read in a thread. Raises APIError, or what reading the source raised."""
        method = self._channel.stream_unary(call.path, **serializers(call.response))

        async def attempt(seconds: float, metadata: Metadata) -> T:
            outgoing = Outgoing(call.messages())
            try:
                return call.parse(await method(_read_in_thread(outgoing), timeout=seconds, metadata=metadata))
            except (grpc.RpcError, asyncio.CancelledError):
                # gRPC cancels the call, and with it this await, when the messages raise.
                if outgoing.error is not None:
                    raise outgoing.error from None
                raise

        return await self._retrying(attempt, self.settings.attempts(retry=True, timeout=timeout))

    def stream(self, call: Streaming[R, T], seconds: float) -> AsyncServerStream[T]:
        """Starts one attempt at a streaming call with a deadline in seconds; errors come from the iterator."""
        method = self._channel.unary_stream(call.path, **serializers(call.response))
        request_id = new_request_id()
        running = method(call.request, timeout=seconds, metadata=call_metadata(request_id))
        return AsyncServerStream(running, call.parse, request_id)

    async def _retrying(self, attempt: Callable[[float, Metadata], Awaitable[T]], attempts: Attempts) -> T:
        request_id = new_request_id()
        while True:
            try:
                return await attempt(attempts.remaining_s(), call_metadata(request_id))
            except grpc.RpcError as error:
                delay = attempts.delay_after(api_error(error, request_id))
            await asyncio.sleep(delay)


async def _read_in_thread(outgoing: Outgoing) -> AsyncIterator[Message]:
    while (message := await asyncio.to_thread(next, outgoing, None)) is not None:
        yield message
