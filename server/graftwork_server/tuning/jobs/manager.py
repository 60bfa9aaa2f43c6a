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
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument, Unavailable
from graftwork_server.hub.database.records import JobEventRecord, JobRecord, StateChanged, TuningJobSpec
from graftwork_server.hub.hub import Hub
from graftwork_server.hub.registry import request_key
from graftwork_server.logs import log_event
from graftwork_server.names import check_adapter_id, new_job_id
from graftwork_server.text import TextProcessor
from graftwork_server.tuning.automatic import choose_held_out, given_settings
from graftwork_server.tuning.data import DatasetReport, check_dataset_file
from graftwork_server.tuning.data.check import refuse_bad_lines
from graftwork_server.tuning.jobs.context import EngineCalls, EngineStatus, JobContext, check_strategy
from graftwork_server.tuning.jobs.run import JobRun
from graftwork_server.tuning.schedule import held_out_count
from graftwork_server.types import JobState, ModelInfo, SettingChoice, StrategyInfo, require_generation
from graftwork_server.wire.tuning import JobEvent

MAX_VALIDATION_FRACTION = 0.5
EVENTS_PER_READ = 256
_NOMINAL_ROWS, _NOMINAL_TOKENS = 1_000, 100_000
"""Stand in for data that is not there yet, when settings are checked."""

DatasetCheck = Callable[[Path, int], Awaitable[DatasetReport]]

_log = logging.getLogger("graftwork.tuning")


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
        self._context = JobContext(hub, engine, self._status, model.fingerprint, strategies, self._notify)
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

    async def create(self, spec: TuningJobSpec, request_id: str = "") -> JobRecord:
        """Checks everything that can be checked before training, and queues the job.

        Raises InvalidArgument (fields named, DATASET_INVALID, DATASET_NO_LOSS, REQUEST_ID_REUSED), NotFound
        (DATASET_NOT_FOUND), AlreadyExists (ADAPTER_EXISTS), FailedPrecondition (STRATEGY_UNAVAILABLE,
        TOKENIZER_MISSING, BASE_IS_ENCODER), and what the strategy says about its settings.
        """
        request = request_key("CreateTuningJob", request_id, spec)
        if (known := await asyncio.to_thread(self._hub.jobs.find_request, request)) is not None:
            return known
        await self._check_spec(spec)
        if not spec.dataset_id:
            raise InvalidArgument("a job needs a data set", reason="DATASET_MISSING", field="spec.dataset")
        report = await self._checked_dataset(spec, spec.dataset_id, "spec.dataset")
        fraction, choices = _held_out_fraction(spec, report.row_count)
        held_out = held_out_count(report.row_count, fraction)
        rows = report.row_count - held_out
        if spec.validation_dataset_id:
            validation = await self._checked_dataset(spec, spec.validation_dataset_id, "spec.validation_dataset")
            held_out = validation.row_count
        tokens = math.ceil(report.total_tokens * rows / report.row_count)
        prepared = await self._engine.prepare_job(spec.strategy, spec.config, rows, tokens, held_out)
        complete = msgspec.structs.replace(
            spec, validation_fraction=fraction, config=prepared.config, choices=[*choices, *prepared.choices]
        )
        job = await asyncio.to_thread(
            self._hub.jobs.create, new_job_id(), complete, prepared.estimate, self._model.fingerprint, request
        )
        log_event(
            _log,
            "job created",
            job=job.job_id,
            strategy=spec.strategy,
            adapter=spec.adapter_id,
            dataset=spec.dataset_id,
            rows=report.row_count,
            steps=job.estimate.total_steps,
        )
        self._later(self._start_next())
        return job

    async def check(self, spec: TuningJobSpec) -> None:
        """Checks what can be checked without the data: strategy, settings, adapter. Raises as create does."""
        await self._check_spec(spec)
        await self._engine.prepare_job(spec.strategy, spec.config, _NOMINAL_ROWS, _NOMINAL_TOKENS, 0)

    async def get(self, job_id: str) -> JobRecord:
        """A job. Raises NotFound (JOB_NOT_FOUND)."""
        return await asyncio.to_thread(self._hub.jobs.get, job_id)

    async def list(self, page_size: int = 0, page_token: str = "") -> tuple[Sequence[JobRecord], str]:
        """Jobs, newest first, and the next page's token."""
        return await asyncio.to_thread(self._hub.jobs.list, page_size, page_token)

    async def delete(self, job_id: str) -> None:
        """Forgets a job that has ended. Raises NotFound, FailedPrecondition (JOB_NOT_ENDED)."""
        await asyncio.to_thread(self._hub.jobs.delete, job_id)

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
                    log_event(_log, "job cancelled", job=job_id)
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
                run = JobRun(job, self._context)
                task = asyncio.create_task(run.run(), name=f"job {job.job_id}")
                self._active[job.job_id] = (run, task)
                task.add_done_callback(partial(self._ended, job.job_id))

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._active.pop(job_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            expected = isinstance(error, GraftworkServerError)  # a full disk, say: no defect, so no traceback
            what = f"job {job_id} is left as it is until the next start"
            _log.error("%s: %s", what, error, exc_info=None if expected else error)
            return
        if not self._stopping:
            self._later(self._start_next())

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _check_in_thread(self, path: Path, max_sequence_tokens: int) -> DatasetReport:
        context = self._model.context_tokens
        return await asyncio.to_thread(check_dataset_file, path, self._text, max_sequence_tokens, context)

    async def _check_spec(self, spec: TuningJobSpec) -> None:
        require_generation(self._model, "tuning")
        _check_ranges(spec)
        check_strategy(self._strategies(), spec.strategy, "spec.strategy")
        await asyncio.to_thread(self._hub.jobs.check_target, spec)

    async def _checked_dataset(self, spec: TuningJobSpec, dataset_id: str, field: str) -> DatasetReport:
        if self._text is None:
            raise FailedPrecondition(
                "the base model has no tokenizer, so nothing can be tuned on text", reason="TOKENIZER_MISSING"
            )
        await asyncio.to_thread(self._hub.datasets.get, dataset_id, field)
        report = await self._check(self._hub.store.dataset_path(dataset_id), self._row_limit(spec))
        refuse_bad_lines(report, f"data set {dataset_id}", field)
        return report

    def _row_limit(self, spec: TuningJobSpec) -> int:
        """Tokens that rows are cut to. A setting that is no such number is the strategy's to refuse."""
        limit = spec.config.get("max_sequence_tokens")
        context = self._model.context_tokens
        if isinstance(limit, int | float) and 0 < limit < context:
            return int(limit)
        return context


def _held_out_fraction(spec: TuningJobSpec, row_count: int) -> tuple[float, list[SettingChoice]]:
    """The fraction of rows to hold out, and where it comes from."""
    key = "validation_fraction"
    if spec.validation_dataset_id:
        return 0.0, []
    if spec.validation_fraction is not None:
        return spec.validation_fraction, given_settings({key: spec.validation_fraction})
    choice = choose_held_out(spec.config, row_count)
    if choice is None:
        return 0.0, []
    return choice.value, [SettingChoice(key=key, value=choice.value, reason=choice.reason)]


def _check_ranges(spec: TuningJobSpec) -> None:
    check_adapter_id(spec.adapter_id, "spec.adapter_id")
    fraction = spec.validation_fraction or 0.0
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
