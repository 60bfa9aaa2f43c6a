"""The gRPC server: its limits, its services, and the order in which it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from graftwork.v1 import adapters_pb2, generation_pb2, server_pb2, strategies_pb2, tuning_pb2
from graftwork.v1.adapters_pb2_grpc import AdapterServiceServicer, add_AdapterServiceServicer_to_server
from graftwork.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from graftwork.v1.server_pb2_grpc import ServerServiceServicer, add_ServerServiceServicer_to_server
from graftwork.v1.strategies_pb2_grpc import StrategyServiceServicer, add_StrategyServiceServicer_to_server
from graftwork.v1.tuning_pb2_grpc import TuningServiceServicer, add_TuningServiceServicer_to_server
from graftwork_server.config import parse_listen
from graftwork_server.front.rpc.health import HealthService
from graftwork_server.front.rpc.interceptors import CallInterceptor, Drain
from graftwork_server.wire.tuning import JobEvent

log = logging.getLogger("graftwork.server")

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (generation_pb2, "GenerationService"),
        (adapters_pb2, "AdapterService"),
        (tuning_pb2, "TuningService"),
        (strategies_pb2, "StrategyService"),
        (server_pb2, "ServerService"),
    )
)
MAX_RECEIVE_BYTES = 4 << 20
MAX_SEND_BYTES = 64 << 20


class ListenError(Exception):
    """The address cannot be served on; one plain line."""


def resolve_listen(listen: str, insecure: bool) -> str:
    """`listen` as a literal address.

    Raises ListenError if the host is unknown, or reachable from other machines without `insecure`. The literal is what
    is bound: a name could mean another address a moment after it was checked.
    """
    host, port = parse_listen(listen)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ListenError(f"cannot listen on {listen}: the host {host!r} is not known") from None
    addresses = sorted({str(entry[4][0]) for entry in found}, key=lambda text: ":" in text)
    open_to_others = [address for address in addresses if not ipaddress.ip_address(address.split("%")[0]).is_loopback]
    if open_to_others and not insecure:
        raise ListenError(
            f"refused to listen on {listen}: other machines could reach {open_to_others[0]}, and there are no keys and "
            "no TLS; listen on 127.0.0.1, or say --insecure if the network is yours alone"
        )
    return f"[{addresses[0]}]:{port}" if ":" in addresses[0] else f"{addresses[0]}:{port}"


class _MethodsToo:
    """The default descriptor pool, which also finds the file of a method: `grpcurl describe package.Service.Method`.

    protobuf's pool knows the names of messages, enumerations and services, and not of services' methods.
    """

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # the pool's own name for it
        """The file that declares `symbol`. Raises KeyError."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service = self._pool.FindServiceByName(symbol.rpartition(".")[0])
            if symbol.rpartition(".")[2] not in service.methods_by_name:
                raise
            return service.file


class RpcServer:
    """Serves the five services, health and reflection on one address."""

    def __init__(self, max_queue: int, drain: Drain) -> None:
        self._drain = drain
        self._server = grpc.aio.server(interceptors=[CallInterceptor(drain)], options=_options(max_queue))
        self._health = HealthService()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, pool=_MethodsToo())  # type: ignore[arg-type]

    def bind(self, address: str) -> str:
        """Takes `address` (a literal) and returns it with the real port. Raises ListenError."""
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ListenError(f"cannot listen on {address}: the port is in use or not permitted")
        return f"{address.rpartition(':')[0]}:{port}"

    async def start(
        self,
        generation: GenerationServiceServicer,
        adapters: AdapterServiceServicer,
        tuning: TuningServiceServicer,
        strategies: StrategyServiceServicer,
        status: ServerServiceServicer,
    ) -> None:
        """Answers calls from now on."""
        add_GenerationServiceServicer_to_server(generation, self._server)
        add_AdapterServiceServicer_to_server(adapters, self._server)
        add_TuningServiceServicer_to_server(tuning, self._server)
        add_StrategyServiceServicer_to_server(strategies, self._server)
        add_ServerServiceServicer_to_server(status, self._server)
        await self.set_serving(True)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """Answers of the health service from now on, for the server and for each service."""
        status = health_pb2.HealthCheckResponse
        for service in ("", *SERVICES):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def drain(self, seconds: float) -> bool:
        """Refuses new calls and lets the running ones finish; false if some still run after `seconds`."""
        self._drain.started.set()
        await self._health.enter_graceful_shutdown()
        return await self._drain.wait_idle(seconds)

    async def stop(self, seconds: float) -> None:
        """Closes the port; calls that still run after `seconds` are broken off."""
        await self._server.stop(seconds)


class HealthReporter:
    """Tells the health service whether there is an engine."""

    def __init__(self, server: RpcServer) -> None:
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()

    def on_engine_ready(self) -> None:
        """SERVING again."""
        self._set(True)

    def on_engine_lost(self) -> None:
        """NOT_SERVING until there is a new engine."""
        self._set(False)

    def on_job_event(self, event: JobEvent) -> None:
        """No matter of health."""

    def _set(self, serving: bool) -> None:
        task = asyncio.create_task(self._server.set_serving(serving))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _options(max_queue: int) -> list[tuple[str, int]]:
    """Limits per connection, so that one client cannot take all that HTTP/2 gives for free."""
    return [
        ("grpc.so_reuseport", 0),  # Two servers on one port would share its calls at random.
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.max_send_message_length", MAX_SEND_BYTES),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.absolute_max_metadata_size", 32 << 10),
        # Above max_queue, so that a full queue is answered and not waited for in the client's library.
        ("grpc.max_concurrent_streams", 2 * max_queue + 128),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 4),
        ("grpc.max_connection_idle_ms", 3_600_000),
    ]
