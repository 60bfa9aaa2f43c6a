"""client.tuning: jobs that turn a data set into a new version of an adapter."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from graftwork.jobs import AsyncTuningJob, TuningJob
from graftwork.requests import tuning as requests
from graftwork.resources.paging import async_pages, pages
from graftwork.transport.async_transport import AsyncTransport
from graftwork.transport.sync_transport import Transport
from graftwork.types import Dataset


class Tuning:
    """Tuning jobs. Every method raises APIError; timeout is in seconds (None: the client's)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        *,
        strategy: str,
        dataset: str | Dataset,
        adapter: str,
        config: Mapping[str, Any] | None = None,
        validation: str | Dataset | None = None,
        validation_fraction: float | None = None,
        load: bool = False,
        new_version: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> TuningJob:
        """Starts a job and returns its handle; job.wait() returns the result.

        dataset, validation: a Dataset or its id. adapter: the id to publish to. new_version: if the adapter exists,
        publish its next version, which its name then serves; otherwise AlreadyExistsError. config: the strategy's
        settings, as client.strategies.get(strategy).config_schema says. validation_fraction: fraction of the rows in
        [0, 0.5] kept out to measure held-out loss, not together with validation; None: the server chooses, unless
        config fixes the steps. load: load the version once it is published. request_id: an id of your own, so that a
        repeated call returns the first one's job. What the server chose is in job.info.choices, with the reasons.
        Raises InvalidArgumentError with the wrong settings, NotFoundError.
        """
        call = requests.create_job(
            strategy=strategy,
            dataset=dataset,
            adapter=adapter,
            config=config,
            validation=validation,
            validation_fraction=validation_fraction,
            load=load,
            new_version=new_version,
            request_id=request_id,
        )
        return TuningJob(self._transport, self._transport.unary(call, timeout))

    def check(
        self,
        *,
        strategy: str,
        adapter: str,
        config: Mapping[str, Any] | None = None,
        validation_fraction: float | None = None,
        new_version: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Checks what create would refuse whatever the data: strategy, settings, adapter. Creates nothing.

        To be asked before a large data set is uploaded. Arguments and errors are those of create.
        """
        call = requests.create_job(
            strategy=strategy,
            dataset=None,
            adapter=adapter,
            config=config,
            validation_fraction=validation_fraction,
            new_version=new_version,
            validate_only=True,
        )
        self._transport.unary(call, timeout)

    def get(self, job: str, *, timeout: float | None = None) -> TuningJob:
        """Returns the handle of a job, by id. Raises NotFoundError."""
        return TuningJob(self._transport, self._transport.unary(requests.get_job(job), timeout))

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[TuningJob]:
        """Yields the handles of all jobs, newest first, fetching page after page. page_size: 0: the server's."""
        infos = pages(self._transport, lambda token: requests.list_jobs(page_size, token), timeout)
        return (TuningJob(self._transport, info) for info in infos)

    def delete(self, job: str, *, timeout: float | None = None) -> None:
        """Deletes a job that has ended, by id; the version that it published stays. Never sent twice.

        Raises NotFoundError, FailedPreconditionError for a job that has not ended.
        """
        self._transport.unary(requests.delete_job(job), timeout)


class AsyncTuning:
    """As Tuning, for asyncio."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(
        self,
        *,
        strategy: str,
        dataset: str | Dataset,
        adapter: str,
        config: Mapping[str, Any] | None = None,
        validation: str | Dataset | None = None,
        validation_fraction: float | None = None,
        load: bool = False,
        new_version: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> AsyncTuningJob:
        """As Tuning.create."""
        call = requests.create_job(
            strategy=strategy,
            dataset=dataset,
            adapter=adapter,
            config=config,
            validation=validation,
            validation_fraction=validation_fraction,
            load=load,
            new_version=new_version,
            request_id=request_id,
        )
        return AsyncTuningJob(self._transport, await self._transport.unary(call, timeout))

    async def check(
        self,
        *,
        strategy: str,
        adapter: str,
        config: Mapping[str, Any] | None = None,
        validation_fraction: float | None = None,
        new_version: bool = False,
        timeout: float | None = None,
    ) -> None:
        """As Tuning.check."""
        call = requests.create_job(
            strategy=strategy,
            dataset=None,
            adapter=adapter,
            config=config,
            validation_fraction=validation_fraction,
            new_version=new_version,
            validate_only=True,
        )
        await self._transport.unary(call, timeout)

    async def get(self, job: str, *, timeout: float | None = None) -> AsyncTuningJob:
        """As Tuning.get."""
        return AsyncTuningJob(self._transport, await self._transport.unary(requests.get_job(job), timeout))

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> AsyncIterator[AsyncTuningJob]:
        """As Tuning.list, for async for."""
        infos = async_pages(self._transport, lambda token: requests.list_jobs(page_size, token), timeout)
        return (AsyncTuningJob(self._transport, info) async for info in infos)

    async def delete(self, job: str, *, timeout: float | None = None) -> None:
        """As Tuning.delete."""
        await self._transport.unary(requests.delete_job(job), timeout)
