"""client.strategies: the plugins that know how one family of variants is trained, stored and served."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from graftwork.requests import strategies as requests
from graftwork.resources.paging import async_pages, pages
from graftwork.transport.async_transport import AsyncTransport
from graftwork.transport.sync_transport import Transport
from graftwork.types import Strategy


class Strategies:
    """Strategies, those that failed to load included. Every method raises APIError; timeout is in seconds."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get(self, strategy: str, *, timeout: float | None = None) -> Strategy:
        """Returns a strategy with the JSON schema of its settings. Raises NotFoundError."""
        return self._transport.unary(requests.get_strategy(strategy), timeout)

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Strategy]:
        """Yields all strategies by id, fetching page after page. page_size: per request, 0: the server's."""
        return pages(self._transport, lambda token: requests.list_strategies(page_size, token), timeout)


class AsyncStrategies:
    """As Strategies, for asyncio."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def get(self, strategy: str, *, timeout: float | None = None) -> Strategy:
        """As Strategies.get."""
        return await self._transport.unary(requests.get_strategy(strategy), timeout)

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> AsyncIterator[Strategy]:
        """As Strategies.list, for async for."""
        return async_pages(self._transport, lambda token: requests.list_strategies(page_size, token), timeout)
