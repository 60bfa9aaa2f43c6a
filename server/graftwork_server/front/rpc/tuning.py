"""TuningService: data sets in, jobs on their way, events out. What happens in a job is the matter of tuning/jobs/."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from graftwork.v1 import tuning_pb2 as pb
from graftwork.v1.tuning_pb2_grpc import TuningServiceServicer
from graftwork_server.errors import InvalidArgument, Unavailable
from graftwork_server.front.rpc.convert import (
    dataset_message,
    event_message,
    job_message,
    report_message,
    tuning_spec,
)
from graftwork_server.front.rpc.interceptors import Drain
from graftwork_server.front.rpc.streaming import Uploads, check_chunk, first_payload
from graftwork_server.hub.files.uploads import DatasetUpload
from graftwork_server.hub.hub import Hub
from graftwork_server.logs import log_event, note
from graftwork_server.names import parse_dataset, parse_job
from graftwork_server.process.threads import run_to_end
from graftwork_server.tuning.data.check import DatasetChecker, refuse_bad_lines
from graftwork_server.tuning.jobs.manager import JobManager

log = logging.getLogger("graftwork.tuning")

MAX_DISPLAY_NAME = 200

Context = grpc.aio.ServicerContext


class TuningService(TuningServiceServicer):
    """Data sets and tuning jobs of this server. `max_dataset_bytes` is for one data set."""

    def __init__(
        self,
        hub: Hub,
        jobs: JobManager,
        checker: DatasetChecker,
        drain: Drain,
        max_dataset_bytes: int,
        uploads: Uploads,
    ) -> None:
        self._hub = hub
        self._jobs = jobs
        self._checker = checker
        self._drain = drain
        self._max_dataset_bytes = max_dataset_bytes
        self._uploads = uploads

    # ------------------------------------------------------------------------------------------ data sets

    async def UploadDataset(
        self, request_iterator: AsyncIterator[pb.UploadDatasetRequest], context: Context
    ) -> pb.UploadDatasetResponse:
        """Checks and stores a data set."""
        with self._uploads.open(request_iterator) as requests:
            upload = (await first_payload(requests, "upload")).upload
            _check_upload(upload)
            with DatasetUpload(self._hub.store, self._max_dataset_bytes, upload.size_bytes) as received:
                await _receive(requests, received)
                report = await self._checker.check(received.path)
                refuse_bad_lines(report)
                assert report.format is not None
                dataset = await run_to_end(
                    self._hub.datasets.store,
                    received,
                    display_name=upload.display_name,
                    format=report.format,
                    row_count=report.row_count,
                )
        log_event(log, "data set stored", dataset=dataset.dataset_id, rows=dataset.row_count, bytes=dataset.size_bytes)
        return pb.UploadDatasetResponse(dataset=dataset_message(dataset))

    async def ValidateDataset(
        self, request_iterator: AsyncIterator[pb.ValidateDatasetRequest], context: Context
    ) -> pb.ValidateDatasetResponse:
        """Reports on a data set and stores nothing."""
        with self._uploads.open(request_iterator) as requests:
            check = (await first_payload(requests, "check")).check
            longest = self._checker.context_tokens
            if not 0 <= check.max_sequence_tokens <= longest:
                raise InvalidArgument(
                    f"max_sequence_tokens is {check.max_sequence_tokens}; 1 to the context's {longest}, or 0 for that, "
                    "is accepted",
                    reason="INVALID_PARAMETER",
                    field="check.max_sequence_tokens",
                )
            if check.dataset:
                identifier = parse_dataset(check.dataset, "check.dataset")
                await asyncio.to_thread(self._hub.datasets.get, identifier, "check.dataset")
                path = self._hub.store.dataset_path(identifier)
                return report_message(await self._checker.check(path, check.max_sequence_tokens))
            with DatasetUpload(self._hub.store, self._max_dataset_bytes) as received:
                await _receive(requests, received)
                return report_message(await self._checker.check(received.path, check.max_sequence_tokens))

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.GetDatasetResponse:
        """One data set."""
        dataset = await asyncio.to_thread(self._hub.datasets.get, parse_dataset(request.name, "name"))
        return pb.GetDatasetResponse(dataset=dataset_message(dataset))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        """Data sets, newest first, a page at a time."""
        datasets, token = await asyncio.to_thread(self._hub.datasets.list, request.page_size, request.page_token)
        return pb.ListDatasetsResponse(datasets=[dataset_message(one) for one in datasets], next_page_token=token)

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Context) -> pb.DeleteDatasetResponse:
        """Forgets a data set that no job needs."""
        identifier = parse_dataset(request.name, "name")
        await run_to_end(self._hub.datasets.delete, identifier)
        log_event(log, "data set deleted", dataset=identifier)
        return pb.DeleteDatasetResponse()

    # ------------------------------------------------------------------------------------------ jobs

    async def CreateTuningJob(self, request: pb.CreateTuningJobRequest, context: Context) -> pb.CreateTuningJobResponse:
        """Queues a job, or only checks what can be checked without its data."""
        if request.validate_only:
            await self._jobs.check(tuning_spec(request.spec))
            return pb.CreateTuningJobResponse(job=pb.TuningJob(spec=request.spec))
        job = await self._jobs.create(tuning_spec(request.spec), request.request_id)
        note(job=job.job_id)
        return pb.CreateTuningJobResponse(job=job_message(job))

    async def GetTuningJob(self, request: pb.GetTuningJobRequest, context: Context) -> pb.GetTuningJobResponse:
        """One job."""
        job = await self._jobs.get(parse_job(request.name))
        return pb.GetTuningJobResponse(job=job_message(job))

    async def ListTuningJobs(self, request: pb.ListTuningJobsRequest, context: Context) -> pb.ListTuningJobsResponse:
        """Jobs, newest first, a page at a time."""
        jobs, token = await self._jobs.list(request.page_size, request.page_token)
        return pb.ListTuningJobsResponse(jobs=[job_message(job) for job in jobs], next_page_token=token)

    async def CancelTuningJob(self, request: pb.CancelTuningJobRequest, context: Context) -> pb.CancelTuningJobResponse:
        """Ends a job without a version."""
        return pb.CancelTuningJobResponse(job=job_message(await self._jobs.cancel(parse_job(request.name))))

    async def DeleteTuningJob(self, request: pb.DeleteTuningJobRequest, context: Context) -> pb.DeleteTuningJobResponse:
        """Forgets a job that has ended."""
        identifier = parse_job(request.name)
        await self._jobs.delete(identifier)
        log_event(log, "job deleted", job=identifier)
        return pb.DeleteTuningJobResponse()

    async def WatchTuningJob(  # type: ignore[override]  # writes to the context instead of yielding
        self, request: pb.WatchTuningJobRequest, context: Context
    ) -> None:
        """Streams a job's events until it has ended. A drain breaks it off: the client resumes after its last event."""
        identifier = parse_job(request.name)
        watching = asyncio.ensure_future(self._watch(identifier, request.after_sequence, context))
        draining = asyncio.ensure_future(self._drain.started.wait())
        try:
            await asyncio.wait({watching, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not watching.done():
                raise Unavailable(
                    "the server is shutting down; watch again with after_sequence",
                    reason="SHUTTING_DOWN",
                    metadata={"retry_after_ms": "1000"},
                )
            await watching
        finally:
            watching.cancel()
            draining.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, identifier: str, after_sequence: int, context: Context) -> None:
        async with aclosing(self._jobs.watch(identifier, after_sequence)) as events:
            async for event in events:
                await context.write(pb.WatchTuningJobResponse(event=event_message(event)))


def _check_upload(upload: pb.DatasetUpload) -> None:
    if len(upload.display_name) > MAX_DISPLAY_NAME or not upload.display_name.isprintable():
        raise InvalidArgument(
            f"display_name has at most {MAX_DISPLAY_NAME} printable characters",
            reason="INVALID_PARAMETER",
            field="upload.display_name",
        )
    if upload.size_bytes < 0:
        raise InvalidArgument("size_bytes must not be negative", reason="INVALID_PARAMETER", field="upload.size_bytes")


async def _receive(
    requests: AsyncIterator[pb.UploadDatasetRequest] | AsyncIterator[pb.ValidateDatasetRequest], received: DatasetUpload
) -> None:
    """Takes the bytes that follow the first message."""
    async for request in requests:
        if request.WhichOneof("payload") != "data":
            raise InvalidArgument("only the first message is no data", reason="UPLOAD_OUT_OF_ORDER", field="payload")
        check_chunk(request.data, "data")
        await run_to_end(received.write, request.data)
    await run_to_end(received.finish)
