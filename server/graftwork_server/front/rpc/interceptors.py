"""Around every call: a request id, the mapping of errors to gRPC statuses, the access log, and the refusal to start
new work while the server drains."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from graftwork_server.errors import GraftworkServerError, Internal, InvalidArgument, Unavailable
from graftwork_server.logs import begin_call, log_event
from graftwork_server.logs import client as current_client
from graftwork_server.logs import request_id as current_request_id

log = logging.getLogger("graftwork.rpc")
access_log = logging.getLogger("graftwork.access")

ERROR_DOMAIN = "graftwork"
REQUEST_ID_KEY = "x-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
DETAILS_BYTES = 5_000
"""gRPC clients refuse trailers over 8 KiB by default, so the details, in base64, and the message stay below that."""
MESSAGE_CHARACTERS = 600
VIOLATION_BYTES = 100
LONGEST_REASON_BYTES = 1_000
READ_THE_REST_SECONDS = 0.5

Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class Drain:
    """Whether the server still takes new calls, and which ones run."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        """Set when the server was told to end."""
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """A call begins. Raises Unavailable (SHUTTING_DOWN) once the drain has started."""
        if self.started.is_set():
            raise Unavailable(
                "the server is shutting down", reason="SHUTTING_DOWN", metadata={"retry_after_ms": "1000"}
            )
        self._running += 1
        self._idle.clear()

    def leave(self) -> None:
        """A call has ended."""
        self._running -= 1
        if self._running == 0:
            self._idle.set()

    async def wait_idle(self, seconds: float) -> bool:
        """Waits for the running calls to end; false if some still run after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method. Those of graftwork's own services are logged, and refused and waited for by a drain; health
    and reflection answer to the end."""

    def __init__(self, drain: Drain) -> None:
        self._drain = drain

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Called by gRPC once per call."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # the method is not there
            return handler  # type: ignore[return-value]
        make, behaviour = _kind(handler)
        request_id = _request_id(handler_call_details)
        if handler.request_streaming:
            behaviour = _reads_the_rest(behaviour)
        method = handler_call_details.method.rsplit("/", 1)[-1]
        is_ours = handler_call_details.method.startswith("/graftwork.")
        wrapped = self._wrap(behaviour, method, request_id, is_ours, headers=not handler.response_streaming)
        return make(
            wrapped,
            request_deserializer=_decoder(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _wrap(self, behaviour: Behaviour, method: str, request_id: str, is_ours: bool, *, headers: bool) -> Behaviour:
        """headers: the request id is in the initial metadata too. A stream's leave with its first message, without it:
        gRPC would send them by themselves, which makes many short streams wait for each other's."""

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            token = current_request_id.set(request_id)
            current_client.set(_host(context.peer()))
            facts, outcome = begin_call(), "OK"
            trailing = ((REQUEST_ID_KEY, request_id),)
            entered = False
            try:
                if headers:
                    await context.send_initial_metadata(trailing)
                context.set_trailing_metadata(trailing)
                if is_ours:
                    self._drain.enter()
                    entered = True
                return await behaviour(_decoded(request), context)
            except asyncio.CancelledError:
                outcome = "CANCELLED"
                raise
            except Exception as raised:
                error = _known(raised, request_id)
                outcome = f"{error.code} {error.reason}"
                await _abort(context, error, request_id)
            finally:
                if entered:
                    self._drain.leave()
                if is_ours:
                    log_event(
                        access_log,
                        f"{method} {outcome}",
                        said={"method": method, "outcome": outcome},
                        total_ms=facts.milliseconds,
                        **facts.fields,
                    )
                current_request_id.reset(token)

        return call


def _kind(handler: Any) -> tuple[Callable[..., grpc.RpcMethodHandler], Behaviour]:
    """The maker of handlers of this kind, and the behaviour: all of ours are coroutines of (request, context)."""
    if handler.request_streaming:
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler, _writes(handler.stream_stream)
        return grpc.stream_unary_rpc_method_handler, handler.stream_unary
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler, handler.unary_stream
    return grpc.unary_unary_rpc_method_handler, handler.unary_unary


def _writes(behaviour: Behaviour) -> Behaviour:
    """`behaviour` as a coroutine: reflection's yields what it answers."""
    if not inspect.isasyncgenfunction(behaviour):
        return behaviour

    async def call(requests: Any, context: grpc.aio.ServicerContext) -> None:
        async for answer in behaviour(requests, context):
            await context.write(answer)

    return call


def _reads_the_rest(behaviour: Behaviour) -> Behaviour:
    """`behaviour`, after which what the client still sends is read, for a bounded time, and thrown away.

    A client that is in the middle of sending when the answer comes may report a broken stream instead of it: gRPC's
    asyncio client does.
    """

    async def call(requests: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behaviour(_Decoded(requests), context)
        finally:
            if not context.cancelled():
                with contextlib.suppress(TimeoutError, grpc.RpcError):
                    async with asyncio.timeout(READ_THE_REST_SECONDS):
                        async for _ in requests:
                            pass

    return call


def _decoder(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`deserialize`, which gives an error instead of raising it: gRPC would answer UNKNOWN and log a traceback."""

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            what = f"the bytes sent are no request of this method ({error}); its proto file says what is accepted"
            return InvalidArgument(what, reason="MESSAGE_INVALID")

    return decode


def _decoded(request: Any) -> Any:
    """What a decoder gave, if it is no error."""
    if isinstance(request, InvalidArgument):
        raise request
    return request


class _Decoded:
    """A stream of what a decoder gave; an error is raised where it stands in it."""

    def __init__(self, requests: Any) -> None:
        self._requests = aiter(requests)

    def __aiter__(self) -> _Decoded:
        return self

    async def __anext__(self) -> Any:
        return _decoded(await anext(self._requests))


def _host(peer: str) -> str:
    """The host of gRPC's "ipv4:HOST:PORT": what tells one client from another, as far as anything does."""
    return peer.rpartition(":")[0] or peer


def _request_id(details: grpc.HandlerCallDetails) -> str:
    """The caller's id where it is one, else a new one: what is logged and sent back holds no control characters."""
    for key, value in details.invocation_metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and REQUEST_ID.fullmatch(value):
            return value
    return secrets.token_hex(8)


def _known(error: Exception, request_id: str) -> GraftworkServerError:
    """`error`, or for what is not ours, an Internal that tells the client nothing but where to look it up."""
    if isinstance(error, Internal):
        log.error("%s: %s", error.reason, error.message)
    if isinstance(error, GraftworkServerError):
        return error
    log.error("a call failed", exc_info=error)
    return Internal(f"the server failed on this request; its log has the cause under {request_id}", reason="INTERNAL")


async def _abort(context: grpc.aio.ServicerContext, error: GraftworkServerError, request_id: str) -> None:
    status = to_status(error)
    await context.abort(
        getattr(grpc.StatusCode, error.code, grpc.StatusCode.UNKNOWN),
        status.message,
        trailing_metadata=(
            (REQUEST_ID_KEY, request_id),
            ("grpc-status-details-bin", status.SerializeToString()),
        ),
    )


def to_status(error: GraftworkServerError) -> status_pb2.Status:
    """`error` as google.rpc.Status with ErrorInfo, and BadRequest and RetryInfo where they say something (AIP-193)."""
    code: int = getattr(grpc.StatusCode, error.code, grpc.StatusCode.UNKNOWN).value[0]
    metadata = {key: _cut(value, 200) for key, value in error.metadata.items()}
    status = status_pb2.Status(code=code, message=_cut(error.message, MESSAGE_CHARACTERS))
    _add(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata))
    if "retry_after_ms" in error.metadata:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.metadata["retry_after_ms"]))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if error.violations:
        _add(status, _bad_request(error, DETAILS_BYTES - status.ByteSize()))
    return status


def _bad_request(error: GraftworkServerError, budget: int) -> error_details_pb2.BadRequest:
    """Violations as long as the trailers have room for them, each whole; then how many there are beside them."""
    details = error_details_pb2.BadRequest()
    budget -= VIOLATION_BYTES  # for the last one, which counts the others
    for index, violation in enumerate(error.violations):
        field, description = _cut(violation.field, VIOLATION_BYTES), _cut(violation.description, LONGEST_REASON_BYTES)
        size = len(field.encode()) + len(description.encode()) + 16
        if size > budget:
            left = len(error.violations) - index
            details.field_violations.add(field="more", description=f"{left} more, which an answer has no room for")
            break
        details.field_violations.add(field=field, description=description)
        budget -= size
    return details


def _cut(text: str, size: int) -> str:
    """`text`, which is printable, in at most `size` bytes of UTF-8."""
    encoded = text.encode()
    if len(encoded) <= size:
        return encoded.decode()
    return encoded[: max(size - 3, 0)].decode("utf-8", "ignore") + "..."


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
