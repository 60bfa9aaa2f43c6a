"""Tuning jobs and their events. A job's columns follow its events, in the same transaction. Blocking."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from graftwork_server.errors import ErrorBody, FailedPrecondition, NotFound
from graftwork_server.hub.database.connection import Database, now
from graftwork_server.hub.database.pages import check_page_size, one_page, page_after
from graftwork_server.hub.database.records import (
    JobEventRecord,
    JobRecord,
    NewVersion,
    Publication,
    RecordedEvent,
    StateChanged,
    TuningJobSpec,
    VersionRecord,
)
from graftwork_server.hub.database.tables import Dataset, Job, JobEventRow
from graftwork_server.hub.publishing import FINAL, check_target, insert_version, newest_version
from graftwork_server.hub.registry import RequestKey, recall, remember
from graftwork_server.types import JobState, TuningEstimate, TuningProgress, TuningResult
from graftwork_server.wire.tuning import Checkpointed, Evaluated, Note, Progress

_POSITION = re.compile(r"[0-9]{1,18}")
T = TypeVar("T")


class JobRegistry:
    """Tuning jobs and their events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        job_id: str,
        spec: TuningJobSpec,
        estimate: TuningEstimate,
        base_fingerprint: str,
        request: RequestKey | None,
    ) -> JobRecord:
        """A new job, PENDING. Two calls with the same request create one job; both get it.

        Raises as check_target does.
        """
        with self._database.write() as session:
            if request is not None and (resource := recall(session, request)) is not None:
                return _record(_job(session, resource))
            _check_datasets(session, spec)
            _check_target(session, spec)
            newest = newest_version(session, spec.adapter_id)
            job = Job(
                id=job_id,
                spec=_to_json(spec),
                base_fingerprint=base_fingerprint,
                state=JobState.PENDING.value,
                estimate=_to_json(estimate),
                engine_losses=0,
                follows=newest.number if newest is not None else 0,
                create_time=now(),
            )
            session.add(job)
            session.flush()
            _append(session, job, [StateChanged(state=JobState.PENDING)])
            if request is not None:
                remember(session, request, job_id)
            return _record(job)

    def check_target(self, spec: TuningJobSpec) -> None:
        """Raises AlreadyExists (ADAPTER_EXISTS) if the job could not publish to its adapter."""
        with self._database.read() as session:
            _check_target(session, spec)

    def find_request(self, request: RequestKey | None) -> JobRecord | None:
        """The job that this request created before. Raises InvalidArgument (REQUEST_ID_REUSED)."""
        if request is None:
            return None
        with self._database.read() as session:
            resource = recall(session, request)
            return None if resource is None else _record(_job(session, resource))

    def get(self, job_id: str) -> JobRecord:
        """A job. Raises NotFound (JOB_NOT_FOUND)."""
        with self._database.read() as session:
            return _record(_job(session, job_id))

    def list(self, page_size: int = 0, token: str = "") -> tuple[Sequence[JobRecord], str]:
        """Jobs, newest first, and the next page's token ("": there is none)."""
        size, before = check_page_size(page_size), page_after("tuningJobs", token, _POSITION)
        query = select(Job).order_by(Job.position.desc()).limit(size + 1)
        if before is not None:
            query = query.where(Job.position < int(before))
        with self._database.read() as session:
            rows, following = one_page("tuningJobs", session.scalars(query).all(), size, lambda row: str(row.position))
            return [_record(row) for row in rows], following

    def unfinished(self) -> Sequence[JobRecord]:
        """Jobs that have not ended, in the order they were created."""
        with self._database.read() as session:
            rows = session.scalars(select(Job).where(Job.state.not_in(FINAL)).order_by(Job.position))
            return [_record(row) for row in rows]

    def delete(self, job_id: str) -> None:
        """Forgets a job and its events. Raises NotFound, FailedPrecondition (JOB_NOT_ENDED)."""
        with self._database.write(makes_room=True) as session:
            job = _job(session, job_id)
            if not JobState(job.state).final:
                raise FailedPrecondition(
                    f"job {job_id} has not ended ({job.state}); cancel it first", reason="JOB_NOT_ENDED", field="name"
                )
            session.delete(job)

    def events(self, job_id: str, after_sequence: int, limit: int) -> tuple[Sequence[JobEventRecord], bool]:
        """The next events, at most `limit`, and whether none can follow them."""
        query = select(JobEventRow).where(JobEventRow.job_id == job_id, JobEventRow.sequence > after_sequence)
        with self._database.read() as session:
            job = _job(session, job_id)
            rows = session.scalars(query.order_by(JobEventRow.sequence).limit(limit)).all()
            events = [JobEventRecord(sequence=r.sequence, time=r.time, event=_recorded_event(r.payload)) for r in rows]
            return events, len(events) < limit and JobState(job.state).final

    def record(
        self,
        job_id: str,
        events: Sequence[RecordedEvent],
        *,
        error: ErrorBody | None = None,
        engine_losses: int | None = None,
    ) -> JobRecord:
        """Adds events in one transaction; reports of steps that the job has already are left out.

        Raises FailedPrecondition (JOB_ENDED) if the job has ended.
        """
        # Its state can be told on a full disk, too: that it is paused, and that it has ended, which frees its files.
        changes_state = any(isinstance(event, StateChanged) for event in events)
        with self._database.write(makes_room=changes_state) as session:
            job = _open_job(session, job_id)
            _append(session, job, events)
            if error is not None:
                job.error = _to_json(error)
            if engine_losses is not None:
                job.engine_losses = engine_losses
            return _record(job)

    def announce(self, job_id: str, publication: Publication | None) -> None:
        """Notes what the job is about to publish, before its files are moved; None: nothing after all."""
        with self._database.write() as session:
            _open_job(session, job_id).publication = None if publication is None else _to_json(publication)

    def publish(
        self, job_id: str, version: NewVersion, result: TuningResult, events: Sequence[RecordedEvent]
    ) -> tuple[JobRecord, VersionRecord]:
        """The version, the job's result, its events and its state SUCCEEDED: all in one transaction, or nothing."""
        with self._database.write() as session:
            job = _open_job(session, job_id)
            published = insert_version(session, version)
            job.adapter_version = published.name
            job.follows = published.follows
            job.result = _to_json(result)
            _append(session, job, [*events, StateChanged(state=JobState.SUCCEEDED)])
            return _record(job), published


def _check_datasets(session: Session, spec: TuningJobSpec) -> None:
    """In the job's own transaction: what is not there any more now was deleted since it was checked."""
    fields = (("spec.dataset", spec.dataset_id), ("spec.validation_dataset", spec.validation_dataset_id))
    for field, dataset_id in fields:
        if dataset_id and session.get(Dataset, dataset_id) is None:
            raise NotFound(f"the data set {dataset_id} was deleted just now", reason="DATASET_NOT_FOUND", field=field)


def _check_target(session: Session, spec: TuningJobSpec) -> None:
    check_target(session, spec.adapter_id, may_exist=spec.new_version, field="spec.adapter_id")


def _job(session: Session, job_id: str) -> Job:
    job = session.scalar(select(Job).where(Job.id == job_id))
    if job is None:
        raise NotFound(f"there is no tuning job {job_id[:100]!r}", reason="JOB_NOT_FOUND", field="name")
    return job


def _open_job(session: Session, job_id: str) -> Job:
    job = _job(session, job_id)
    if JobState(job.state).final:
        raise FailedPrecondition(f"tuning job {job_id} has ended: {job.state}", reason="JOB_ENDED", field="name")
    return job


def _append(session: Session, job: Job, events: Sequence[RecordedEvent]) -> None:
    last = session.scalar(select(func.max(JobEventRow.sequence)).where(JobEventRow.job_id == job.id)) or 0
    time = now()
    for sequence, event in enumerate(_unknown(session, job, events), last + 1):
        payload = _to_json(event)
        kind = type(event).__name__
        session.add(JobEventRow(job_id=job.id, sequence=sequence, time=time, kind=kind, payload=payload))
        match event:
            case StateChanged(state=state):
                job.state = state.value
                if state is JobState.RUNNING and job.start_time is None:
                    job.start_time = time
                if state.final:
                    job.end_time = time
            case Progress(progress=progress):
                job.progress = _to_json(progress)
            case Evaluated(loss=loss):
                job.validation_loss = _to_json(loss)
            case Checkpointed():
                job.engine_losses = 0
            case Note():
                pass


def _unknown(session: Session, job: Job, events: Sequence[RecordedEvent]) -> Sequence[RecordedEvent]:
    """`events` without reports of steps that the job has already: a run that goes on makes some again."""
    reached: dict[str, int] = {}
    new = []
    for event in events:
        step = _step(event)
        if step is not None:
            kind = type(event).__name__
            if kind not in reached:
                reached[kind] = _reached(session, job, kind)
            if step <= reached[kind]:
                continue
            reached[kind] = step
        new.append(event)
    return new


def _reached(session: Session, job: Job, kind: str) -> int:
    of_kind = select(JobEventRow.payload).where(JobEventRow.job_id == job.id, JobEventRow.kind == kind)
    newest = session.scalar(of_kind.order_by(JobEventRow.sequence.desc()).limit(1))
    return (_step(_recorded_event(newest)) or 0) if newest is not None else 0


def _step(event: RecordedEvent) -> int | None:
    match event:
        case Progress(progress=progress):
            return progress.step
        case Evaluated(step=step) | Checkpointed(step=step):
            return step
        case _:
            return None


def _record(job: Job) -> JobRecord:
    return JobRecord(
        job_id=job.id,
        spec=msgspec.convert(json.loads(job.spec), TuningJobSpec),
        base_fingerprint=job.base_fingerprint,
        state=JobState(job.state),
        estimate=msgspec.convert(json.loads(job.estimate), TuningEstimate),
        progress=_from_json(job.progress, TuningProgress),
        validation_loss=_from_json(job.validation_loss, float),
        publication=_from_json(job.publication, Publication),
        result=_from_json(job.result, TuningResult),
        adapter_version=job.adapter_version,
        error=_from_json(job.error, ErrorBody),
        engine_losses=job.engine_losses,
        follows=job.follows,
        create_time=job.create_time,
        start_time=job.start_time,
        end_time=job.end_time,
    )


def _recorded_event(payload: str) -> RecordedEvent:
    return msgspec.convert(json.loads(payload), RecordedEvent)


def _to_json(value: Any) -> str:
    # Not msgspec's own encoder: it writes NaN, the loss of a run that diverged, as null.
    return json.dumps(msgspec.to_builtins(value))


def _from_json(text: str | None, type: type[T]) -> T | None:
    return None if text is None else msgspec.convert(json.loads(text), type)
