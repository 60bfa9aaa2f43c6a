"""client.adapters: everything servable by name beside the base model."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

from graftwork.requests import adapters as requests
from graftwork.resources.paging import async_pages, pages
from graftwork.transport.async_transport import AsyncTransport
from graftwork.transport.sync_transport import Transport
from graftwork.transport.uploads import AdapterFiles, Progress
from graftwork.types import Adapter


class Adapters:
    """Adapters. Where a method takes an adapter, it takes "id", "id@version", a resource name or an Adapter.

    Every method raises APIError, and takes timeout in seconds (None: the client's).
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        adapter_id: str,
        directory: str | os.PathLike[str],
        *,
        strategy: str | None = None,
        new_version: bool = False,
        load: bool = False,
        request_id: str | None = None,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Uploads a folder, such as PEFT's save_pretrained writes, and publishes it as a version.

        strategy: None lets the server recognise it from the files. new_version: if the adapter exists, publish its next
        version. load: load it at once; the answer then has load_report. request_id: an id of your own, so that a
        repeated call returns the first one's version. on_progress: called with bytes sent and bytes in all.
        Returns the published adapter. Raises UploadError for a folder that cannot be sent, AlreadyExistsError,
        InvalidArgumentError and FailedPreconditionError for files that do not fit the base model.
        """
        call = requests.create_adapter(
            AdapterFiles(directory, on_progress),
            adapter_id=adapter_id,
            strategy=strategy,
            new_version=new_version,
            load=load,
            request_id=request_id,
        )
        return self._transport.upload(call, timeout)

    def get(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """Returns an adapter with its newest version, or the version asked for. Raises NotFoundError."""
        return self._transport.unary(requests.get_adapter(adapter), timeout)

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Adapter]:
        """Yields all adapters by id, fetching page after page. page_size: per request, 0: the server's."""
        return pages(self._transport, lambda token: requests.list_adapters(page_size, token), timeout)

    def versions(
        self, adapter: str | Adapter, *, page_size: int = 0, timeout: float | None = None
    ) -> Iterator[Adapter]:
        """Yields an adapter's versions, newest first, fetching page after page.

        page_size: per request, 0: the server's. Raises NotFoundError, and ValueError for a single version.
        """
        return pages(self._transport, lambda token: requests.list_versions(adapter, page_size, token), timeout)

    def delete(self, adapter: str | Adapter, *, timeout: float | None = None) -> int:
        """Deletes an adapter with all its versions, or with "id@version" that one, and returns how many were deleted.

        An Adapter stands for all its versions here. Requests already running finish. Raises NotFoundError, and
        ValueError for "id@latest". Never sent twice.
        """
        return self._transport.unary(requests.delete(adapter), timeout)

    def load(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """Loads a version beside the base now and returns the adapter with its load_report. Raises NotFoundError."""
        return self._transport.unary(requests.load_adapter(adapter), timeout)

    def unload(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """Takes a version off the device and returns the adapter; the next request loads it again. Unpins it."""
        return self._transport.unary(requests.unload_adapter(adapter), timeout)

    def pin(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """Loads a version and keeps it on the device, over restarts too, until it is unpinned, unloaded or deleted.

        Returns the adapter with its load_report. Raises NotFoundError, ResourceExhaustedError if there is no room.
        """
        return self._transport.unary(requests.pin_adapter(adapter), timeout)

    def unpin(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """Lets a version be evicted again and returns the adapter. Raises NotFoundError."""
        return self._transport.unary(requests.unpin_adapter(adapter), timeout)


class AsyncAdapters:
    """As Adapters, for asyncio."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(
        self,
        adapter_id: str,
        directory: str | os.PathLike[str],
        *,
        strategy: str | None = None,
        new_version: bool = False,
        load: bool = False,
        request_id: str | None = None,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """As Adapters.create. Files are read and on_progress is called in a thread."""
        call = requests.create_adapter(
            await asyncio.to_thread(AdapterFiles, directory, on_progress),
            adapter_id=adapter_id,
            strategy=strategy,
            new_version=new_version,
            load=load,
            request_id=request_id,
        )
        return await self._transport.upload(call, timeout)

    async def get(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """As Adapters.get."""
        return await self._transport.unary(requests.get_adapter(adapter), timeout)

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> AsyncIterator[Adapter]:
        """As Adapters.list, for async for."""
        return async_pages(self._transport, lambda token: requests.list_adapters(page_size, token), timeout)

    def versions(
        self, adapter: str | Adapter, *, page_size: int = 0, timeout: float | None = None
    ) -> AsyncIterator[Adapter]:
        """As Adapters.versions, for async for."""
        return async_pages(self._transport, lambda token: requests.list_versions(adapter, page_size, token), timeout)

    async def delete(self, adapter: str | Adapter, *, timeout: float | None = None) -> int:
        """As Adapters.delete."""
        return await self._transport.unary(requests.delete(adapter), timeout)

    async def load(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """As Adapters.load."""
        return await self._transport.unary(requests.load_adapter(adapter), timeout)

    async def unload(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """As Adapters.unload."""
        return await self._transport.unary(requests.unload_adapter(adapter), timeout)

    async def pin(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """As Adapters.pin."""
        return await self._transport.unary(requests.pin_adapter(adapter), timeout)

    async def unpin(self, adapter: str | Adapter, *, timeout: float | None = None) -> Adapter:
        """As Adapters.unpin."""
        return await self._transport.unary(requests.unpin_adapter(adapter), timeout)
