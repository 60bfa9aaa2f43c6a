"""client.datasets: the JSONL files that jobs are trained on."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from graftwork.requests import datasets as requests
from graftwork.resources.paging import async_pages, pages
from graftwork.transport.async_transport import AsyncTransport
from graftwork.transport.sync_transport import Transport
from graftwork.transport.uploads import DatasetSource, Progress, Source
from graftwork.types import Dataset, DatasetReport


class Datasets:
    """Data sets. A source is the path of a JSONL file, its bytes, or an iterable of rows (held in memory)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(
        self,
        source: Source,
        *,
        display_name: str | None = None,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Dataset:
        """Stores a data set and returns it; the same bytes are stored once.

        display_name: a name for people, None: the file's. on_progress: called with bytes sent and bytes in all.
        timeout: seconds, None: the client's. Raises InvalidArgumentError with the first ten bad lines,
        and those after them by kind, among its field_violations; UploadError if the file cannot be read, and APIError.
        """
        return self._transport.upload(
            requests.upload_dataset(DatasetSource(source, on_progress), display_name), timeout
        )

    def validate(
        self,
        source: Source | None = None,
        *,
        dataset: str | Dataset | None = None,
        max_sequence_tokens: int = 0,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> DatasetReport:
        """Checks a source, or the stored data set named by dataset=, and returns what was found. Stores nothing.

        max_sequence_tokens: where rows are cut, 0: the base model's context. timeout: seconds, None: the client's.
        Bad lines are reported, not raised. Raises ValueError unless exactly one of the two is given, and APIError.
        """
        sent = None if source is None else DatasetSource(source, on_progress)
        return self._transport.upload(requests.validate_dataset(sent, dataset, max_sequence_tokens), timeout)

    def get(self, dataset: str | Dataset, *, timeout: float | None = None) -> Dataset:
        """Returns a data set, by id. Raises NotFoundError."""
        return self._transport.unary(requests.get_dataset(dataset), timeout)

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Dataset]:
        """Yields all data sets, newest first, fetching page after page. page_size: 0: the server's."""
        return pages(self._transport, lambda token: requests.list_datasets(page_size, token), timeout)

    def delete(self, dataset: str | Dataset, *, timeout: float | None = None) -> None:
        """Deletes a data set. Raises NotFoundError, FailedPreconditionError while a job needs it. Never sent twice."""
        self._transport.unary(requests.delete_dataset(dataset), timeout)


class AsyncDatasets:
    """As Datasets, for asyncio."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def upload(
        self,
        source: Source,
        *,
        display_name: str | None = None,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Dataset:
        """As Datasets.upload. Files are read and on_progress is called in a thread."""
        sent = await asyncio.to_thread(DatasetSource, source, on_progress)
        return await self._transport.upload(requests.upload_dataset(sent, display_name), timeout)

    async def validate(
        self,
        source: Source | None = None,
        *,
        dataset: str | Dataset | None = None,
        max_sequence_tokens: int = 0,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> DatasetReport:
        """As Datasets.validate."""
        sent = None if source is None else await asyncio.to_thread(DatasetSource, source, on_progress)
        call = requests.validate_dataset(sent, dataset, max_sequence_tokens)
        return await self._transport.upload(call, timeout)

    async def get(self, dataset: str | Dataset, *, timeout: float | None = None) -> Dataset:
        """As Datasets.get."""
        return await self._transport.unary(requests.get_dataset(dataset), timeout)

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> AsyncIterator[Dataset]:
        """As Datasets.list, for async for."""
        return async_pages(self._transport, lambda token: requests.list_datasets(page_size, token), timeout)

    async def delete(self, dataset: str | Dataset, *, timeout: float | None = None) -> None:
        """As Datasets.delete."""
        await self._transport.unary(requests.delete_dataset(dataset), timeout)
