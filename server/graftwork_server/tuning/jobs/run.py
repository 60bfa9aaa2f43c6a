"""One tuning job on its way from PENDING to its end: the only place that moves a job's state once it was created.

What reaches a run (the tuner's events, the engine's loss and return, a wish to cancel) waits in its inbox and is
handled one at a time, so no two of them race. Everything it does survives a kill at any point: see publish.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import msgspec

from graftwork_server.durable import storage_errors
from graftwork_server.errors import (
    ErrorBody,
    FailedPrecondition,
    GraftworkServerError,
    Internal,
    Unavailable,
    body_of,
    from_body,
)
from graftwork_server.hub.database.records import JobRecord, RecordedEvent, StateChanged
from graftwork_server.logs import log_event
from graftwork_server.tuning.jobs.context import JobContext, check_still_possible
from graftwork_server.tuning.jobs.publish import JobPublisher
from graftwork_server.tuning.jobs.running_job import CancelledByUser, RunningJob
from graftwork_server.types import JobState, TuningResult
from graftwork_server.wire.tuning import Checkpointed, Failed, Finished, Note, Progress, TunerEvent, TunerTask

MAX_ENGINE_LOSSES = 3
"""Engines that may die under a job, without a checkpoint in between, before it is given up."""
BATCH_SECONDS = 0.1
"""Steps reported within this time are written together."""
MAX_BATCH = 1000
MAX_RETRY_SECONDS = 60.0

_log = logging.getLogger("graftwork.tuning")


class _EngineLost(msgspec.Struct, frozen=True):
    number: int
    """The engine that was lost; the first one has number 0."""


class _EngineReady(msgspec.Struct, frozen=True):
    pass


class _Cancel(msgspec.Struct, frozen=True):
    pass


class JobRun:
    """Drives one job. `run` returns when the job has ended, or when its task is cancelled (the server stops)."""

    def __init__(self, record: JobRecord, context: JobContext) -> None:
        self._job = RunningJob(record, context)
        self._publisher = JobPublisher(self._job, context)
        self._context = context
        self._engine = context.engine
        self._inbox: asyncio.Queue[TunerEvent | _EngineLost | _EngineReady | _Cancel] = asyncio.Queue()

    # ------------------------------------------------------------------------------------------ what reaches it

    def tell_event(self, event: TunerEvent) -> None:
        """The tuner said something."""
        self._inbox.put_nowait(event)

    def tell_engine_lost(self, number: int) -> None:
        """Engine `number` is gone, and the tuner with it."""
        self._inbox.put_nowait(_EngineLost(number))

    def tell_engine_ready(self) -> None:
        """There is an engine again."""
        self._inbox.put_nowait(_EngineReady())

    def tell_cancel(self) -> None:
        """Somebody wants the job to end; it may still end otherwise if it is about to."""
        self._job.cancelled.set()
        self._inbox.put_nowait(_Cancel())

    # ------------------------------------------------------------------------------------------ its life

    async def run(self) -> None:
        """Trains and publishes, or ends the job saying why not."""
        try:
            if not await self._publisher.publish_announced():
                await self._train_and_publish()
        except CancelledByUser:
            await self._end([StateChanged(state=JobState.CANCELLED)])
            log_event(_log, "job cancelled", job=self._job.job_id)
        except Exception as error:
            if not isinstance(error, GraftworkServerError):
                _log.exception("job %s ended by a defect", self._job.job_id)
            body = body_of(error)
            log_event(_log, "job failed", logging.ERROR, job=self._job.job_id, reason=body.reason, error=body.message)
            await self._end_failed(body)
        else:
            await self._job.discard_files()

    async def _train_and_publish(self) -> None:
        check_still_possible(self._job.record, self._context)
        result: TuningResult | None = None
        while True:
            await self._engine_ready()
            if result is None:
                result = await self._train()
            if result is not None and await self._publisher.publish(result):
                return
            await self._count_loss()

    async def _train(self) -> TuningResult | None:
        """Starts the tuner and follows it to its end; None if the engine was lost on the way."""
        engine_number = self._context.status.lost
        running = self._job.record.state is JobState.RUNNING
        await self._job.write([Note(text="resumed") if running else StateChanged(state=JobState.RUNNING)])
        log_event(
            _log,
            "job resumed" if running else "job started",
            job=self._job.job_id,
            adapter=self._job.record.spec.adapter_id,
        )
        spec = await self._job.in_thread(self._prepare_folder)
        try:
            await self._engine.start_job(spec)
        except Unavailable:
            return None
        try:
            return await self._follow(engine_number)
        except FailedPrecondition as error:
            if error.reason != "DISK_FULL":
                raise
        await self._job.wait_for_room()
        return await self._train()

    async def _count_loss(self) -> None:
        """Raises Internal (ENGINE_LOST_REPEATEDLY) once it is likely that the job itself ends the engines."""
        losses = self._job.record.engine_losses + 1
        await self._job.write([Note(text="the engine ended under the job")], engine_losses=losses)
        if losses >= MAX_ENGINE_LOSSES:
            raise Internal(
                f"the engine ended {losses} times under this job, with no checkpoint in between; it may need more "
                "memory than there is: try smaller batches, shorter rows or a smaller rank",
                reason="ENGINE_LOST_REPEATEDLY",
            )

    async def _follow(self, engine_number: int) -> TuningResult | None:
        while True:
            events: list[RecordedEvent] = []
            try:
                for item in await self._next_batch():
                    match item:
                        case Finished(result=result):
                            return result
                        case Failed(error=error):
                            raise from_body(error)
                        case _Cancel():
                            raise CancelledByUser
                        case _EngineLost(number=number):
                            # One that was lost before the tuner started is old news.
                            if number >= engine_number:
                                return None
                        case _EngineReady():
                            pass
                        case _:
                            if isinstance(item, Checkpointed):
                                self._job.has_progressed()
                            events.append(item)
            finally:
                if events:
                    await self._job.write(events)

    async def _next_batch(self) -> Sequence[TunerEvent | _EngineLost | _EngineReady | _Cancel]:
        batch = [await self._inbox.get()]
        if isinstance(batch[0], Progress):
            await asyncio.sleep(BATCH_SECONDS)
        while not self._inbox.empty() and len(batch) < MAX_BATCH:
            batch.append(self._inbox.get_nowait())
        return batch

    async def _engine_ready(self) -> None:
        while not self._job.cancelled.is_set() and not self._context.status.ready:
            await self._inbox.get()
        if self._job.cancelled.is_set():
            raise CancelledByUser

    def _prepare_folder(self) -> TunerTask:
        spec, store = self._job.record.spec, self._context.hub.store
        with storage_errors("preparing a job"):
            self._job.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Of a tuner that ended before its word of it was heard; the next one renames its own to this place.
        store.discard(self._job.artifact)
        validation = spec.validation_dataset_id
        return TunerTask(
            job_id=self._job.job_id,
            strategy=spec.strategy,
            config=spec.config,
            dataset_path=str(store.dataset_path(spec.dataset_id)),
            validation_path=str(store.dataset_path(validation)) if validation else None,
            validation_fraction=spec.validation_fraction or 0.0,
            job_dir=str(self._job.folder),
            artifact_dir=str(self._job.artifact),
            reported_step=self._job.record.progress.step if self._job.record.progress is not None else 0,
        )

    # ------------------------------------------------------------------------------------------ its end

    async def _end_failed(self, error: ErrorBody) -> None:
        await self._end([Note(text=error.message), StateChanged(state=JobState.FAILED)], error)

    async def _end(self, events: Sequence[RecordedEvent], error: ErrorBody | None = None) -> None:
        """Stops the tuner and ends the job. Files go first: on a full disk, the row needs their place."""
        with contextlib.suppress(GraftworkServerError):  # Unavailable: the tuner went with its engine
            await self._engine.stop_job(self._job.job_id)
        await self._job.discard_files()
        delay = 0.5
        while True:
            try:
                await self._job.write_once(events, error=error)
                return
            except GraftworkServerError as raised:
                if raised.reason == "JOB_ENDED":
                    return
                _log.error("the end of job %s could not be written: %s", self._job.job_id, raised.message)
            await asyncio.sleep(delay)
            delay = min(delay * 2, MAX_RETRY_SECONDS)
