"""client.server: what is served, within which limits, and what goes on."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

from graftwork.requests import server as requests
from graftwork.transport.async_transport import AsyncTransport
from graftwork.transport.sync_transport import Transport
from graftwork.types import ServerInfo


class Server:
    """The server itself. Every method raises APIError; timeout is in seconds (None: the client's)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns the base model, the limits, what is loaded, what waits and runs, and the versions."""
        return self._transport.unary(requests.get_server(), timeout)


class AsyncServer:
    """As Server, for asyncio."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def get(self, *, timeout: float | None = None) -> ServerInfo:
        """As Server.get."""
        return await self._transport.unary(requests.get_server(), timeout)
