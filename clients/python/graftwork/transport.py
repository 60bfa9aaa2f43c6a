"""Carries calls.py out over a synchronous channel, and holds what both transports share: address, limits, metadata."""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic

import grpc

from graftwork.calls import Message, R, Streaming, T, Unary, Upload
from graftwork.requests import new_request_id
from graftwork.retries import Attempts
from graftwork.status import REQUEST_ID_KEY, api_error
from graftwork.version import VERSION

DEFAULT_ADDRESS = "127.0.0.1:8470"
_ADDRESS = re.compile(
    r"(?:unix|unix-abstract|dns|ipv4|ipv6|vsock|xds):.+|(?:[^\s:/\[\]]+|\[[0-9A-Fa-f:.%\w]+\]):[0-9]{1,5}"
)
"""HOST:PORT, an IPv6 address in brackets, or one of gRPC's own schemes."""
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_MAX_RETRIES = 3
_RECEIVE_BYTES = 64 * 1024 * 1024
_SEND_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """How a client calls.

    address: HOST:PORT. timeout: seconds for each call unless it says otherwise, retries included. max_retries: how
    often a call that may be sent again is sent again.
    """

    address: str
    timeout: float
    max_retries: int

    @classmethod
    def of(cls, address: str | None, timeout: float, max_retries: int) -> Settings:
        """Settings with the address from GRAFTWORK_ADDRESS where none is given. Raises ValueError for bad values."""
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout}; expected seconds greater than 0")
        if max_retries < 0:
            raise ValueError(f"max_retries is {max_retries}; expected 0 or more")
        chosen = address or os.environ.get("GRAFTWORK_ADDRESS") or DEFAULT_ADDRESS
        if not _ADDRESS.fullmatch(chosen):
            raise ValueError(f"address is {chosen!r}; HOST:PORT is accepted, such as {DEFAULT_ADDRESS}")
        return cls(chosen, timeout, max_retries)

    def attempts(self, *, retry: bool, timeout: float | None) -> Attempts:
        """The attempts at one call."""
        seconds = self.timeout if timeout is None else timeout
        return Attempts(retry=retry, max_retries=self.max_retries, timeout=seconds)

    def channel_options(self) -> list[tuple[str, Any]]:
        """gRPC channel arguments."""
        options: list[tuple[str, Any]] = [
            ("grpc.primary_user_agent", f"graftwork-python/{VERSION}"),
            ("grpc.max_receive_message_length", _RECEIVE_BYTES),
            ("grpc.max_send_message_length", _SEND_BYTES),
            # Just above the 5 minutes that a gRPC server allows by default, so that no server takes it for abuse.
            ("grpc.keepalive_time_ms", 330_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            # A quiet watch sends no data for hours and is to be kept alive all the same.
            ("grpc.http2.max_pings_without_data", 0),
            # gRPC's own reconnect back-off (1 s to 2 min) would outlast ours and answer our retries from memory.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ]
        if _is_loopback(self.address):
            # gRPC would send even 127.0.0.1 to the proxy that http_proxy names.
            options.append(("grpc.enable_http_proxy", 0))
        return options


def _is_loopback(address: str) -> bool:
    host = address.rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")


def call_metadata(request_id: str) -> tuple[tuple[str, str], ...]:
    """What is sent beside each request."""
    return ((REQUEST_ID_KEY, request_id),)


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
        method = self._channel.unary_unary(
            call.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.response.FromString,
        )
        return self._retrying(
            lambda seconds, metadata: call.parse(method(call.request, timeout=seconds, metadata=metadata)),
            self.settings.attempts(retry=call.retry, timeout=timeout),
        )

    def upload(self, call: Upload[R, T], timeout: float | None = None) -> T:
        """Carries an upload out. Raises APIError, or what reading the source raised."""
        method = self._channel.stream_unary(
            call.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=call.response.FromString,
        )

        def attempt(seconds: float, metadata: tuple[tuple[str, str], ...]) -> T:
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
        method = self._channel.unary_stream(
            call.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.response.FromString,
        )
        request_id = new_request_id()
        running = method(call.request, timeout=seconds, metadata=call_metadata(request_id))
        return ServerStream(running, call.parse, request_id)

    def _retrying(self, attempt: Callable[[float, tuple[tuple[str, str], ...]], T], attempts: Attempts) -> T:
        request_id = new_request_id()
        while True:
            try:
                return attempt(attempts.remaining_s(), call_metadata(request_id))
            except grpc.RpcError as error:
                delay = attempts.delay_after(api_error(error, request_id))
            time.sleep(delay)
