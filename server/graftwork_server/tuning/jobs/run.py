"""One tuning job on its way from PENDING to its end: the only place that moves a job's state once it was created.

What reaches a run (the tuner's events, the engine's loss and return, a wish to cancel) waits in its inbox and is
handled one at a time, so no two of them race. Everything it does survives a kill at any point: see _publish.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from graftwork_server.durable import storage_errors
from graftwork_server.errors import (
    ErrorBody,
    FailedPrecondition,
    GraftworkServerError,
    Internal,
    NotFound,
    Unavailable,
    body_of,
    from_body,
)
from graftwork_server.hub.database.records import (
    JobHappening,
    JobRecord,
    NewVersion,
    Publication,
    StateChanged,
)
from graftwork_server.hub.files.safetensors_check import check_safetensors
from graftwork_server.hub.files.store import StoredArtifact, artifact_files, digest_of, write_manifest
from graftwork_server.hub.hub import Hub
from graftwork_server.logs import log_event
from graftwork_server.process import failpoints
from graftwork_server.process.threads import FILES
from graftwork_server.types import AdapterRef, ArtifactInfo, JobState, LoadReport, StrategyInfo, TuningResult
from graftwork_server.wire.tuning import (
    Checkpointed,
    Failed,
    Finished,
    JobSpec,
    Note,
    PreparedJob,
    Progress,
    TunerEvent,
)

MAX_ENGINE_LOSSES = 3
"""Engines that may die under a job, without a checkpoint in between, before it is given up."""
LINGER_SECONDS = 0.1
"""Steps reported within this time are written together."""
MAX_BATCH = 1000
MAX_RETRY_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 1.0
LEAST_ROOM_BYTES = 1 << 20
"""Without as much, a paused job need not try again."""

_log = logging.getLogger("graftwork.tuning")
T = TypeVar("T")


class EngineCalls(Protocol):
    """What jobs need of the engine; engine.client.EngineClient has it. All raise Unavailable while there is none."""

    @property
    def ready(self) -> bool:
        """Whether there is an engine now."""

    async def prepare_job(
        self, strategy: str, config: dict[str, Any], row_count: int, total_tokens: int, held_out_rows: int = 0
    ) -> PreparedJob: ...

    async def start_job(self, job: JobSpec) -> int: ...

    async def stop_job(self, job_id: str) -> bool: ...

    async def load(self, adapter: AdapterRef) -> LoadReport: ...

    async def inspect(self, path: str, strategy: str | None = None) -> ArtifactInfo: ...


class EngineStatus:
    """Whether there is an engine, and how many were lost before it."""

    def __init__(self) -> None:
        self.ready = True
        self.lost = 0


class Surroundings(msgspec.Struct, frozen=True):
    """What all runs share."""

    hub: Hub
    engine: EngineCalls
    status: EngineStatus
    base_fingerprint: str
    strategies: Callable[[], Sequence[StrategyInfo]]
    changed: Callable[[str], None]
    """Called with the job's id after each change that was written."""


class _EngineLost(msgspec.Struct, frozen=True):
    number: int
    """The engine that was lost; the first one has number 0."""


class _EngineReady(msgspec.Struct, frozen=True):
    pass


class _Cancel(msgspec.Struct, frozen=True):
    pass


class _CancelledByUser(Exception):
    pass


def check_strategy(strategies: Sequence[StrategyInfo], strategy_id: str, field: str) -> None:
    """Raises NotFound (STRATEGY_NOT_FOUND) unless the strategy is there, and FailedPrecondition (STRATEGY_UNAVAILABLE)
    unless it can train."""
    strategy = next((strategy for strategy in strategies if strategy.id == strategy_id), None)
    able = [strategy.id for strategy in strategies if "train" in strategy.capabilities and not strategy.load_error]
    if strategy is None:
        raise NotFound(
            f"there is no strategy {strategy_id[:100]!r}; strategies that can train: {', '.join(able) or 'none'}",
            reason="STRATEGY_NOT_FOUND",
            field=field,
        )
    if strategy.load_error:
        problem = f"strategy {strategy_id!r} could not be loaded: {strategy.load_error}"
    elif "train" not in strategy.capabilities:
        problem = f"strategy {strategy_id!r} cannot train"
    else:
        return
    raise FailedPrecondition(
        f"{problem}; strategies that can train: {', '.join(able) or 'none'}", reason="STRATEGY_UNAVAILABLE", field=field
    )


class JobRun:
    """Drives one job. `run` returns when the job has ended, or when its task is cancelled (the server stops)."""

    def __init__(self, job: JobRecord, surroundings: Surroundings) -> None:
        self._job = job
        self._hub = surroundings.hub
        self._engine = surroundings.engine
        self._around = surroundings
        self._cancelled = asyncio.Event()
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._folder = self._hub.store.job_path(job.job_id)
        self._artifact = self._folder / "artifact"
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
        self._cancelled.set()
        self._inbox.put_nowait(_Cancel())

    # ------------------------------------------------------------------------------------------ its life

    async def run(self) -> None:
        """Trains and publishes, or ends the job saying why not."""
        try:
            if not await self._publish_announced():
                await self._train_and_publish()
        except _CancelledByUser:
            await self._end([StateChanged(state=JobState.CANCELLED)])
            log_event(_log, "job cancelled", job=self._job.job_id)
        except Exception as error:
            if not isinstance(error, GraftworkServerError):
                _log.exception("job %s ended by a defect", self._job.job_id)
            body = body_of(error)
            log_event(_log, "job failed", logging.ERROR, job=self._job.job_id, reason=body.reason, error=body.message)
            await self._end_failed(body)
        else:
            await self._in_thread(lambda: self._hub.store.discard(self._folder))

    async def _train_and_publish(self) -> None:
        self._check_still_possible()
        result: TuningResult | None = None
        while True:
            await self._engine_ready()
            if result is None:
                result = await self._train()
            if result is not None and await self._publish(result):
                return
            await self._count_loss()

    async def _train(self) -> TuningResult | None:
        """Starts the tuner and follows it to its end; None if the engine was lost on the way."""
        engine_number = self._around.status.lost
        running = self._job.state is JobState.RUNNING
        await self._record([Note(text="resumed") if running else StateChanged(state=JobState.RUNNING)])
        log_event(
            _log, "job resumed" if running else "job started", job=self._job.job_id, adapter=self._job.spec.adapter_id
        )
        spec = await self._in_thread(self._prepare_folder)
        try:
            await self._engine.start_job(spec)
        except Unavailable:
            return None
        try:
            return await self._follow(engine_number)
        except FailedPrecondition as error:
            if error.reason != "DISK_FULL":
                raise
        await self._wait_for_room()
        return await self._train()

    async def _count_loss(self) -> None:
        """Raises Internal (ENGINE_LOST_REPEATEDLY) once it is likely that the job itself ends the engines."""
        losses = self._job.engine_losses + 1
        await self._record([Note(text="the engine ended under the job")], engine_losses=losses)
        if losses >= MAX_ENGINE_LOSSES:
            raise Internal(
                f"the engine ended {losses} times under this job, with no checkpoint in between; it may need more "
                "memory than there is: try smaller batches, shorter rows or a smaller rank",
                reason="ENGINE_LOST_REPEATEDLY",
            )

    async def _follow(self, engine_number: int) -> TuningResult | None:
        while True:
            happenings: list[JobHappening] = []
            try:
                for item in await self._next_batch():
                    match item:
                        case Finished(result=result):
                            return result
                        case Failed(error=error):
                            raise from_body(error)
                        case _Cancel():
                            raise _CancelledByUser
                        case _EngineLost(number=number):
                            # One that was lost before the tuner started is old news.
                            if number >= engine_number:
                                return None
                        case _EngineReady():
                            pass
                        case _:
                            if isinstance(item, Checkpointed):
                                self._pause_seconds = FIRST_PAUSE_SECONDS
                            happenings.append(item)
            finally:
                if happenings:
                    await self._record(happenings)

    async def _next_batch(self) -> Sequence[TunerEvent | _EngineLost | _EngineReady | _Cancel]:
        batch = [await self._inbox.get()]
        if isinstance(batch[0], Progress):
            await asyncio.sleep(LINGER_SECONDS)
        while not self._inbox.empty() and len(batch) < MAX_BATCH:
            batch.append(self._inbox.get_nowait())
        return batch

    async def _engine_ready(self) -> None:
        while not self._cancelled.is_set() and not self._around.status.ready:
            await self._inbox.get()
        if self._cancelled.is_set():
            raise _CancelledByUser

    def _check_still_possible(self) -> None:
        """A job that waited, perhaps over a restart, may have lost what it needs."""
        if self._job.base_fingerprint != self._around.base_fingerprint:
            raise FailedPrecondition(
                "the server hosts another base model now than when this job was created", reason="BASE_MISMATCH"
            )
        check_strategy(self._around.strategies(), self._job.spec.strategy, "spec.strategy")
        for dataset_id in filter(None, (self._job.spec.dataset_id, self._job.spec.validation_dataset_id)):
            if not self._hub.store.dataset_path(dataset_id).is_file():
                raise FailedPrecondition(f"data set {dataset_id} is gone", reason="DATASET_NOT_FOUND")

    def _prepare_folder(self) -> JobSpec:
        spec, store = self._job.spec, self._hub.store
        with storage_errors("preparing a job"):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Of a tuner that ended before its word of it was heard; the next one renames its own to this place.
        store.discard(self._artifact)
        validation = spec.validation_dataset_id
        return JobSpec(
            job_id=self._job.job_id,
            strategy=spec.strategy,
            config=spec.config,
            dataset_path=str(store.dataset_path(spec.dataset_id)),
            validation_path=str(store.dataset_path(validation)) if validation else None,
            validation_fraction=spec.validation_fraction or 0.0,
            job_dir=str(self._folder),
            artifact_dir=str(self._artifact),
            reported_step=self._job.progress.step if self._job.progress is not None else 0,
        )

    # ------------------------------------------------------------------------------------------ publishing

    async def _publish(self, result: TuningResult) -> bool:
        """Makes what the tuner left a version; false if the engine was lost, which has to look at it first.

        In order: the row says what will be published; the files move to their place; one transaction makes the version
        and ends the job. Killed before the move, the files are still the job's; after it, the row tells where they
        are; so the next start completes it (_publish_announced). A version is visible only from the transaction on.
        """
        try:
            info = await self._engine.inspect(str(self._artifact), self._job.spec.strategy)
        except Unavailable:
            return False
        await self._complete(await self._in_thread(lambda: self._announce(info.parameter_count, info.rank, result)))
        return True

    async def _publish_announced(self) -> bool:
        """Completes what an earlier run of the server was about to publish; false if there is nothing."""
        announced = self._job.publication
        if announced is None:
            return False
        self._check_still_possible()
        if not self._hub.store.has_artifact(announced.digest):
            if not self._artifact.is_dir():
                await self._in_thread(lambda: self._hub.jobs.announce(self._job.job_id, None))
                return False
            again = announced
            announced = await self._in_thread(lambda: self._announce(again.parameter_count, again.rank, again.result))
        await self._complete(announced)
        return True

    def _announce(self, parameter_count: int, rank: int, result: TuningResult) -> Publication:
        with storage_errors("publishing a job's result"):
            for name in artifact_files(self._artifact):
                if name.endswith(".safetensors"):
                    check_safetensors(self._artifact / name)
            write_manifest(
                self._artifact,
                strategy=self._job.spec.strategy,
                base_fingerprint=self._job.base_fingerprint,
                parameter_count=parameter_count,
                rank=rank,
                created_by="tuning",
                end_token_ids=result.end_token_ids,
            )
            digest = digest_of(self._artifact)
        publication = Publication(digest=digest, parameter_count=parameter_count, rank=rank, result=result)
        self._hub.jobs.announce(self._job.job_id, publication)
        failpoints.reach("publish.announced")
        return publication

    async def _complete(self, publication: Publication) -> None:
        claim = contextlib.ExitStack()
        claim.enter_context(self._hub.leases.claimed(publication.digest))
        try:
            stored = await self._in_thread(lambda: self._move_to_store(publication.digest))
            notes = await self._load_if_asked(stored)
            await self._in_thread(lambda: self._commit(publication, stored, notes))
        finally:
            await self._in_thread(claim.close)
        self._around.changed(self._job.job_id)

    def _move_to_store(self, digest: str) -> StoredArtifact:
        if self._artifact.is_dir():
            return self._hub.store.adopt(self._artifact, digest)
        return self._hub.store.stored(digest)

    async def _load_if_asked(self, stored: StoredArtifact) -> list[JobHappening]:
        if not self._job.spec.load:
            return []
        name = f"adapters/{self._job.spec.adapter_id}"
        adapter = AdapterRef(digest=stored.digest, path=stored.path, strategy=self._job.spec.strategy, name=name)
        try:
            await self._engine.load(adapter)
        except GraftworkServerError as error:
            return [Note(text=f"published, but not loaded: {error.message}")]
        return []

    def _commit(self, publication: Publication, stored: StoredArtifact, notes: Sequence[JobHappening]) -> None:
        version = NewVersion(
            adapter_id=self._job.spec.adapter_id,
            digest=stored.digest,
            strategy=self._job.spec.strategy,
            base_fingerprint=self._job.base_fingerprint,
            size_bytes=stored.size_bytes,
            parameter_count=publication.parameter_count,
            rank=publication.rank,
            tuning_job=self._job.job_id,
            end_token_ids=publication.result.end_token_ids,
        )
        failpoints.reach("publish.before_commit")
        _, published = self._hub.jobs.publish(self._job.job_id, version, publication.result, notes)
        result = publication.result
        log_event(
            _log,
            "job published",
            job=self._job.job_id,
            adapter=published.name,
            train_ms=result.train_ms,
            final_loss=round(result.final_loss, 4),
        )
        failpoints.reach("publish.after_commit")

    # ------------------------------------------------------------------------------------------ its end

    async def _end_failed(self, error: ErrorBody) -> None:
        await self._end([Note(text=error.message), StateChanged(state=JobState.FAILED)], error)

    async def _end(self, happenings: Sequence[JobHappening], error: ErrorBody | None = None) -> None:
        """Stops the tuner and ends the job. Files go first: on a full disk, the row needs their place."""
        with contextlib.suppress(GraftworkServerError):  # Unavailable: the tuner went with its engine
            await self._engine.stop_job(self._job.job_id)
        await self._in_thread(lambda: self._hub.store.discard(self._folder))
        delay = 0.5
        while True:
            try:
                await self._record_once(happenings, error=error)
                return
            except GraftworkServerError as raised:
                if raised.reason == "JOB_ENDED":
                    return
                _log.error("the end of job %s could not be written: %s", self._job.job_id, raised.message)
            await asyncio.sleep(delay)
            delay = min(delay * 2, MAX_RETRY_SECONDS)

    async def _record(
        self, happenings: Sequence[JobHappening], *, error: ErrorBody | None = None, engine_losses: int | None = None
    ) -> None:
        self._job = await self._in_thread(
            lambda: self._hub.jobs.record(self._job.job_id, happenings, error=error, engine_losses=engine_losses)
        )
        self._around.changed(self._job.job_id)

    async def _record_once(self, happenings: Sequence[JobHappening], error: ErrorBody | None = None) -> None:
        self._job = await self._once_in_thread(lambda: self._hub.jobs.record(self._job.job_id, happenings, error=error))
        self._around.changed(self._job.job_id)

    # ------------------------------------------------------------------------------------------ a full disk

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work`; where the disk is full, once there is room: `work` can be repeated then."""
        while True:
            try:
                return await self._once_in_thread(work)
            except GraftworkServerError as error:
                if error.reason != "STORAGE_FULL":
                    raise
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        """Pauses the job until the disk has room, and longer each time that it then was full again all the same.

        Raises _CancelledByUser.
        """
        text = "paused: the server's disk is full; the job goes on when there is room"
        _log.warning("job %s is %s", self._job.job_id, text)
        with contextlib.suppress(GraftworkServerError):  # the disk may be too full to say so
            await self._record_once([Note(text=text), StateChanged(state=JobState.PAUSED)])
        needed = max(self._job.estimate.artifact_bytes, LEAST_ROOM_BYTES)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_seconds):
                    await self._cancelled.wait()
            if self._cancelled.is_set():
                raise _CancelledByUser
            self._pause_seconds = min(2 * self._pause_seconds, MAX_RETRY_SECONDS)
            if self._hub.store.free_bytes() >= needed:
                break
        if self._job.state is JobState.PAUSED:
            with contextlib.suppress(GraftworkServerError):
                await self._record_once([StateChanged(state=JobState.RUNNING)])

    async def _once_in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work`. If this task is cancelled meanwhile, `work` still ends before the task does."""
        task = asyncio.get_running_loop().run_in_executor(FILES, work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            task.exception()  # nobody is left to hear of it
            raise
