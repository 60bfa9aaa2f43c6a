"""Carries calls out over a synchronous channel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Generic

import grpc

from graftwork.transport.calls import Message, R, Streaming, T, Unary, Upload, serializers
from graftwork.transport.request_ids import Metadata, call_metadata, new_request_id
from graftwork.transport.retries import Attempts
from graftwork.transport.settings import Settings
from graftwork.transport.status import api_error


class Outgoing:
    """The messages of an upload on their way into gRPC, which would swallow an exception of theirs; it is kept here."""

    def __init__(self, messages: Iterator[Message]) -> None:
        self._messages = messages
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        try:
            return next(self._messages)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise


class ServerStream(Generic[T]):
    """One attempt at a streaming call: an iterator of parsed messages that raises APIError.

    request_id: the id that was sent with it.
    """

    def __init__(self, call: Any, parse: Callable[[Any], T], request_id: str) -> None:
        self._call = call
        self._parse = parse
        self.request_id = request_id

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._parse(next(self._call))
        except grpc.RpcError as error:
            raise api_error(error, self.request_id) from error

    def cancel(self) -> None:
        """Ends the call on the server too; does nothing if it has ended."""
        self._call.cancel()


class Transport:
    """A synchronous channel. Safe to use from several threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._channel = grpc.insecure_channel(settings.address, options=settings.channel_options())

    def close(self) -> None:
        """Closes the channel; calls in flight end as cancelled."""
        self._channel.close()

    def unary(self, call: Unary[R, T], timeout: float | None = None) -> T:
        """Carries a call out. Raises APIError."""
        method = self._channel.unary_unary(call.path, **serializers(call.response))
        return self._retrying(
            lambda seconds, metadata: call.parse(method(call.request, timeout=seconds, metadata=metadata)),
            self.settings.attempts(retry=call.retry, timeout=timeout),
        )

    def upload(self, call: Upload[R, T], timeout: float | None = None) -> T:
        """Carries an upload out. Raises APIError, or what reading the source raised."""
        method = self._channel.stream_unary(call.path, **serializers(call.response))

        def attempt(seconds: float, metadata: Metadata) -> T:
            outgoing = Outgoing(call.messages())
            future: Any = method.future(outgoing, timeout=seconds, metadata=metadata)
            try:
                return call.parse(future.result())
            except grpc.RpcError:
                if outgoing.error is not None:
                    raise outgoing.error from None
                raise
            finally:
                future.cancel()  # an interrupted upload must not go on in the background

        return self._retrying(attempt, self.settings.attempts(retry=True, timeout=timeout))

    def stream(self, call: Streaming[R, T], seconds: float) -> ServerStream[T]:
        """Starts one attempt at a streaming call with a deadline in seconds; errors come from the iterator."""
        method = self._channel.unary_stream(call.path, **serializers(call.response))
        request_id = new_request_id()
        running = method(call.request, timeout=seconds, metadata=call_metadata(request_id))
        return ServerStream(running, call.parse, request_id)

    def _retrying(self, attempt: Callable[[float, Metadata], T], attempts: Attempts) -> T:
        request_id = new_request_id()
        while True:
            try:
                return attempt(attempts.remaining_s(), call_metadata(request_id))
            except grpc.RpcError as error:
                delay = attempts.delay_after(api_error(error, request_id))
            time.sleep(delay)
