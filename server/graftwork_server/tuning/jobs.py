"""The front's side of tuning: creates jobs, lets them run in their turn, tells what happens to them.

    PENDING --> RUNNING --> SUCCEEDED      its version was published in the same transaction
        |          +------> FAILED         error says why
        +----------+------> CANCELLED
                PAUSED                     in between, while the disk is full

States and events live in the registry; nothing here is lost with the process. One JobRun drives each running job.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from graftwork_server.errors import FailedPrecondition, InvalidArgument, Unavailable, Violation
from graftwork_server.hub.hub import Hub
from graftwork_server.hub.records import JobEventRecord, JobRecord, StateChanged, TuningSpec
from graftwork_server.hub.registry import check_adapter_id, request_key
from graftwork_server.messages import JobEvent
from graftwork_server.tasks import require_generation
from graftwork_server.text import TextProcessor
from graftwork_server.tuning.data import DatasetReport, check_dataset, read_lines
from graftwork_server.tuning.job_run import EngineCalls, EngineStatus, JobRun, Surroundings, check_strategy
from graftwork_server.tuning.schedule import held_out_count
from graftwork_server.types import JobState, ModelInfo, StrategyInfo

MAX_VALIDATION_FRACTION = 0.5
EVENTS_PER_READ = 256

DatasetCheck = Callable[[Path, int], Awaitable[DatasetReport]]

_log = logging.getLogger(__name__)


class JobManager:
    """All tuning jobs of this server. To be used on one event loop; `start` first, `stop` at the end.

    `text` is None where the base model has no tokenizer; jobs cannot be created then. `strategies` gives those of the
    engine that runs now. `check` reports on a data set's file, its rows cut to so many tokens; default: in a thread.
    """

    def __init__(
        self,
        hub: Hub,
        engine: EngineCalls,
        *,
        model: ModelInfo,
        strategies: Callable[[], Sequence[StrategyInfo]],
        text: TextProcessor | None,
        max_concurrent_jobs: int = 1,
        check: DatasetCheck | None = None,
    ) -> None:
        self._hub = hub
        self._engine = engine
        self._model = model
        self._strategies = strategies
        self._text = text
        self._check = check or self._check_in_thread
        self._max_concurrent = max_concurrent_jobs
        self._status = EngineStatus()
        self._around = Surroundings(hub, engine, self._status, model.fingerprint, strategies, self._notify)
        self._active: dict[str, tuple[JobRun, asyncio.Task[None]]] = {}
        self._choosing = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._changed: dict[str, asyncio.Event] = {}
        self._stopping = False

    # ------------------------------------------------------------------------------------------ life of the server

    async def start(self) -> None:
        """Goes on with the jobs of an earlier run of the server, those that were running first."""
        self._status.ready = self._engine.ready  # it may have died before anybody listened
        await self._start_next()

    async def stop(self) -> None:
        """Leaves jobs as they are, to be resumed by the next start; watchers get Unavailable (SHUTTING_DOWN)."""
        self._stopping = True
        async with self._choosing:
            tasks = [task for _, task in self._active.values()]
        for task in [*tasks, *self._background]:
            task.cancel()
        await asyncio.gather(*tasks, *self._background, return_exceptions=True)
        for event in self._changed.values():
            event.set()

    def on_engine_ready(self) -> None:
        """There is an engine again: jobs that ran in the lost one go on from their last checkpoints."""
        self._status.ready = True
        for run, _ in self._active.values():
            run.tell_engine_ready()

    def on_engine_lost(self) -> None:
        """The engine died, and all tuners with it."""
        self._status.ready = False
        for run, _ in self._active.values():
            run.tell_engine_lost(self._status.lost)
        self._status.lost += 1

    def on_job_event(self, event: JobEvent) -> None:
        """A tuner said something. What a job says that does not run here is dropped."""
        active = self._active.get(event.job_id)
        if active is not None:
            active[0].tell_event(event.event)

    # ------------------------------------------------------------------------------------------ calls

    async def create(self, spec: TuningSpec, request_id: str = "") -> JobRecord:
        """Checks everything that can be checked before training, and queues the job.

        Raises InvalidArgument (fields named, DATASET_INVALID, DATASET_NO_LOSS, REQUEST_ID_REUSED), NotFound
        (DATASET_NOT_FOUND), AlreadyExists (ADAPTER_EXISTS), FailedPrecondition (STRATEGY_UNAVAILABLE,
        TOKENIZER_MISSING, BASE_IS_ENCODER), and what the strategy says about its settings.
        """
        request = request_key("CreateTuningJob", request_id, spec)
        if (known := await asyncio.to_thread(self._hub.jobs.find_request, request)) is not None:
            return known
        require_generation(self._model, "tuning")
        _check_spec(spec)
        check_strategy(self._strategies(), spec.strategy, "spec.strategy")
        await asyncio.to_thread(self._hub.jobs.check_target, spec)
        report = await self._checked_dataset(spec, spec.dataset_id, "spec.dataset")
        if spec.validation_dataset_id:
            await self._checked_dataset(spec, spec.validation_dataset_id, "spec.validation_dataset")
        rows = report.row_count - held_out_count(report.row_count, spec.validation_fraction)
        tokens = math.ceil(report.total_tokens * rows / report.row_count)
        prepared = await self._engine.prepare_job(spec.strategy, spec.config, rows, tokens)
        complete = TuningSpec(
            strategy=spec.strategy,
            dataset_id=spec.dataset_id,
            validation_dataset_id=spec.validation_dataset_id,
            validation_fraction=spec.validation_fraction,
            adapter_id=spec.adapter_id,
            config=prepared.config,
            load=spec.load,
            new_version=spec.new_version,
        )
        job_id = f"job-{secrets.token_hex(8)}"
        job = await asyncio.to_thread(
            self._hub.jobs.create, job_id, complete, prepared.estimate, self._model.fingerprint, request
        )
        self._later(self._start_next())
        return job

    async def get(self, job_id: str) -> JobRecord:
        """A job. Raises NotFound (JOB_NOT_FOUND)."""
        return await asyncio.to_thread(self._hub.jobs.get, job_id)

    async def list(self, page_size: int = 0, page_token: str = "") -> tuple[Sequence[JobRecord], str]:
        """Jobs, newest first, and the next page's token."""
        return await asyncio.to_thread(self._hub.jobs.list, page_size, page_token)

    async def cancel(self, job_id: str) -> JobRecord:
        """Ends a job; returns once its tuner is gone. A second time is no error.

        Raises NotFound, and FailedPrecondition (JOB_ENDED) if it succeeded or failed before.
        """
        async with self._choosing:
            active = self._active.get(job_id)
            if active is None:
                job = await asyncio.to_thread(self._hub.jobs.get, job_id)
                if not job.state.final:
                    ended = [StateChanged(state=JobState.CANCELLED)]
                    job = await asyncio.to_thread(self._hub.jobs.record, job_id, ended)
                    self._notify(job_id)
        if active is not None:
            run, task = active
            run.tell_cancel()
            await asyncio.wait([task])
            job = await asyncio.to_thread(self._hub.jobs.get, job_id)
        if job.state is not JobState.CANCELLED:
            if not job.state.final:
                raise Unavailable("the server is shutting down", reason="SHUTTING_DOWN")
            raise FailedPrecondition(
                f"tuning job {job_id} has ended before: {job.state}", reason="JOB_ENDED", field="name"
            )
        return job

    async def watch(self, job_id: str, after_sequence: int = 0) -> AsyncGenerator[JobEventRecord, None]:
        """Events with a higher sequence number, first those of the past, and ends when the job has ended.

        Events wait in the registry, not here, so a slow reader costs nothing. Raises NotFound (JOB_NOT_FOUND),
        Unavailable (SHUTTING_DOWN).
        """
        if after_sequence < 0:
            raise InvalidArgument(
                "after_sequence must be 0 or the number of an event", reason="SEQUENCE_INVALID", field="after_sequence"
            )
        while True:
            # Taken before reading, so what is written after the reading wakes us.
            changed = self._changed.setdefault(job_id, asyncio.Event())
            try:
                events, complete = await asyncio.to_thread(
                    self._hub.jobs.events, job_id, after_sequence, EVENTS_PER_READ
                )
            except BaseException:
                self._notify(job_id)
                raise
            for event in events:
                yield event
                after_sequence = event.sequence
            if complete:
                self._notify(job_id)
                return
            if self._stopping:
                raise Unavailable("the server is shutting down; watch again later", reason="SHUTTING_DOWN")
            if len(events) < EVENTS_PER_READ:
                await changed.wait()

    # ------------------------------------------------------------------------------------------ behind them

    def _notify(self, job_id: str) -> None:
        """Wakes the watchers of a job; they read, and wait for the next time on a new Event."""
        event = self._changed.pop(job_id, None)
        if event is not None:
            event.set()

    async def _start_next(self) -> None:
        async with self._choosing:
            if self._stopping or len(self._active) >= self._max_concurrent:
                return
            unfinished = await asyncio.to_thread(self._hub.jobs.unfinished)
            waiting = [job for job in unfinished if job.job_id not in self._active]
            waiting.sort(key=lambda job: job.state is JobState.PENDING)
            for job in waiting[: self._max_concurrent - len(self._active)]:
                run = JobRun(job, self._around)
                task = asyncio.create_task(run.run(), name=f"job {job.job_id}")
                self._active[job.job_id] = (run, task)
                task.add_done_callback(partial(self._ended, job.job_id))

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._active.pop(job_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("job %s is left as it is until the next start", job_id, exc_info=error)
            return
        if not self._stopping:
            self._later(self._start_next())

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _check_in_thread(self, path: Path, max_sequence_tokens: int) -> DatasetReport:
        def check() -> DatasetReport:
            with path.open("rb") as file:
                return check_dataset(read_lines(file), self._text, max_sequence_tokens, self._model.context_tokens)

        return await asyncio.to_thread(check)

    async def _checked_dataset(self, spec: TuningSpec, dataset_id: str, field: str) -> DatasetReport:
        if self._text is None:
            raise FailedPrecondition(
                "the base model has no tokenizer, so nothing can be tuned on text", reason="TOKENIZER_MISSING"
            )
        await asyncio.to_thread(self._hub.registry.get_dataset, dataset_id, field)
        report = await self._check(self._hub.store.dataset_path(dataset_id), self._row_limit(spec))
        if not report.valid:
            where = [Violation(": ".join(filter(None, (field, e.place))), e.reason) for e in report.errors]
            first = report.errors[0]
            problems = f"{report.error_count} problems; the first: " if report.error_count > 1 else ""
            place = f"{first.place}: " if first.place else ""
            no_loss = report.error_count == 1 and report.total_tokens > 0 and report.loss_tokens == 0
            raise InvalidArgument(
                f"data set {dataset_id} cannot be trained on: {problems}{place}{first.reason}",
                reason="DATASET_NO_LOSS" if no_loss else "DATASET_INVALID",
                violations=where,
            )
        return report

    def _row_limit(self, spec: TuningSpec) -> int:
        """Tokens that rows are cut to. A setting that is no such number is the strategy's to refuse."""
        limit = spec.config.get("max_sequence_tokens")
        context = self._model.context_tokens
        if isinstance(limit, int | float) and 0 < limit < context:
            return int(limit)
        return context


def _check_spec(spec: TuningSpec) -> None:
    check_adapter_id(spec.adapter_id, "spec.adapter_id")
    if not spec.dataset_id:
        raise InvalidArgument("a job needs a data set", reason="DATASET_MISSING", field="spec.dataset")
    fraction = spec.validation_fraction
    if not 0 <= fraction <= MAX_VALIDATION_FRACTION:  # false for NaN, too
        raise InvalidArgument(
            f"validation_fraction must be from 0 to {MAX_VALIDATION_FRACTION}, not {fraction}",
            reason="VALIDATION_FRACTION_INVALID",
            field="spec.validation_fraction",
        )
    if fraction and spec.validation_dataset_id:
        raise InvalidArgument(
            "give validation_dataset or validation_fraction, not both",
            reason="VALIDATION_AMBIGUOUS",
            field="spec.validation_fraction",
        )
