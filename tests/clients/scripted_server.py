"""A real gRPC server of the real protocol, on a free port of 127.0.0.1, that answers what a test tells it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from graftwork.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    strategies_pb2,
    strategies_pb2_grpc,
    tuning_pb2,
    tuning_pb2_grpc,
)

Step = Callable[[Any, grpc.ServicerContext], Any]

_SERVICES = (
    (adapters_pb2, adapters_pb2_grpc, "AdapterService"),
    (generation_pb2, generation_pb2_grpc, "GenerationService"),
    (server_pb2, server_pb2_grpc, "ServerService"),
    (strategies_pb2, strategies_pb2_grpc, "StrategyService"),
    (tuning_pb2, tuning_pb2_grpc, "TuningService"),
)


@dataclass
class Seen:
    """One attempt that reached the server; request is a list for uploads."""

    method: str
    request: Any
    metadata: dict[str, str]
    seconds_left: float | None


class ScriptedServer:
    """on(method, *steps) says what a method answers; its last step repeats."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._scripts: dict[str, list[Step]] = {}
        self._lock = threading.Lock()
        self._port = 0
        self._server: grpc.Server | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts, or starts again on the same port."""
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0)])
        for messages, stubs, service in _SERVICES:
            register = getattr(stubs, f"add_{service}Servicer_to_server")
            methods = messages.DESCRIPTOR.services_by_name[service].methods
            register(type(service, (), {m.name: staticmethod(self._handler(m)) for m in methods}), server)
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        server.start()
        self._server = server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait(5)
            self._server = None

    def on(self, method: str, *steps: Step | Message | Sequence[Message]) -> None:
        self._scripts[method] = [step if callable(step) else answer(step) for step in steps]

    def requests(self, method: str) -> list[Any]:
        return [seen.request for seen in self.seen if seen.method == method]

    def _handler(self, method: Any) -> Step:
        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            return self._next(method.name, request, context)

        def streaming(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from self._next(method.name, request, context)

        return streaming if method.server_streaming else unary

    def _next(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            script = self._scripts.get(method)
            step = script.pop(0) if script and len(script) > 1 else script[0] if script else None
        if step is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} has no script")
        if not isinstance(request, Message) and not getattr(step, "early", False):
            request = list(request)
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        self.seen.append(Seen(method, request, metadata, context.time_remaining()))
        return step(request, context)


def answer(response: Message | Sequence[Message]) -> Step:
    """A step that answers with a message, or with a stream of them."""
    return lambda request, context: response


def fail(
    code: grpc.StatusCode,
    message: str = "no",
    *,
    reason: str = "",
    metadata: dict[str, str] | None = None,
    violations: dict[str, str] | None = None,
    retry_ms: int | None = None,
    request_id: str = "",
    after: list[Message] | None = None,
    early: bool = False,
) -> Step:
    """A step that ends the call with a status and its google.rpc details.

    after: messages streamed before it. early: without reading what the client still sends.
    """
    details: list[Message] = []
    if reason:
        details.append(error_details_pb2.ErrorInfo(reason=reason, domain="graftwork", metadata=metadata or {}))
    if violations:
        fields = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in violations.items()]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if retry_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(retry_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    trailing: list[tuple[str, str | bytes]] = [("x-request-id", request_id)] if request_id else []
    if details:
        trailing.append(("grpc-status-details-bin", status.SerializeToString()))

    def end(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(tuple(trailing))
        context.abort(code, message)

    def stream(messages: list[Message], context: grpc.ServicerContext) -> Iterator[Message]:
        yield from messages
        end(context)

    def step(request: Any, context: grpc.ServicerContext) -> Any:
        return end(context) if after is None else stream(after, context)

    step.early = early  # type: ignore[attr-defined]
    return step


def hold(first: list[Message], released: threading.Event, arrived: threading.Event | None = None) -> Step:
    """A step that streams some messages, then nothing until the client goes.

    arrived is set once they are sent, released when the client has gone.
    """

    def stream(context: grpc.ServicerContext) -> Iterator[Message]:
        context.add_callback(released.set)
        yield from first
        if arrived is not None:
            arrived.set()
        released.wait(30)

    return lambda request, context: stream(context)
