"""Lists that fetch their next page when it is needed."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from graftwork.transport.async_transport import AsyncTransport
from graftwork.transport.calls import Page, T, Unary
from graftwork.transport.sync_transport import Transport


def pages(transport: Transport, page: Callable[[str], Unary[Any, Page[T]]], timeout: float | None) -> Iterator[T]:
    """The items of all pages; page makes the call for a page token. timeout: seconds for each page."""
    token = ""
    while True:
        answer = transport.unary(page(token), timeout)
        yield from answer.items
        token = answer.next_page_token
        if not token:
            return


async def async_pages(
    transport: AsyncTransport, page: Callable[[str], Unary[Any, Page[T]]], timeout: float | None
) -> AsyncIterator[T]:
    """As pages, for async for."""
    token = ""
    while True:
        answer = await transport.unary(page(token), timeout)
        for item in answer.items:
            yield item
        token = answer.next_page_token
        if not token:
            return
