"""run.py: from start to end and what comes in between, with a real hub and a scripted engine."""

from __future__ import annotations

import asyncio
import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.server.tuning.jobs.jobs_harness import assert_nothing_published, create, events_of, notes, spec, states
from tests.server.tuning.jobs.scripted import (
    ESTIMATE,
    RESULT,
    ROWS,
    Say,
    ScriptedEngine,
    add_dataset,
    ended,
    leave_artifact,
    server,
    step,
    train,
)
from tests.waiting import until

from graftwork_server.errors import ErrorBody, FailedPrecondition
from graftwork_server.front.rpc.convert import job_message
from graftwork_server.hub.database.records import JobEventRecord, JobRecord
from graftwork_server.hub.files import store as store_module
from graftwork_server.hub.hub import Hub
from graftwork_server.tuning.jobs import running_job
from graftwork_server.tuning.jobs.manager import JobManager
from graftwork_server.types import JobState
from graftwork_server.wire.tuning import Failed, Finished, Progress, TunerTask


async def test_a_job_becomes_a_version(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    async with server(tmp_path, engine) as (hub, manager):
        created = await create(hub, manager, load=True, config={"lr": 1.0})
        assert (created.state, created.estimate) == (JobState.PENDING, ESTIMATE)
        assert created.spec.config == {"rank": 8, "lr": 1.0}
        job = await ended(manager, created.job_id)
        version = hub.registry.get_version("a")
        assert (job.state, job.adapter_version, job.result) == (JobState.SUCCEEDED, version.name, RESULT)
        assert (version.tuning_job, version.rank, version.parameter_count) == (job.job_id, 8, 5)
        assert engine.loaded == [version.digest]
        assert sorted(os.listdir(hub.store.artifact_path(version.digest))) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
        ]
        assert job.progress == step(3).progress
        assert job.validation_loss == 0.6
        assert job.create_time <= job.start_time <= job.end_time
        events = await events_of(manager, job.job_id)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert [type(event.event).__name__ for event in events] == [
            "StateChanged",
            "StateChanged",
            *["Progress"] * 3,
            "Checkpointed",
            "Evaluated",
            "StateChanged",
        ]
        assert states(events) == [JobState.PENDING, JobState.RUNNING, JobState.SUCCEEDED]
        await until(lambda: os.listdir(hub.store.jobs) == [])
        again = await create(hub, manager)
        assert (await ended(manager, again.job_id)).adapter_version == "adapters/a/versions/2"


# ------------------------------------------------------------------------------------------- what fails on the way


async def test_a_failed_tuner_fails_its_job(tmp_path: Path) -> None:
    async def fail(job: TunerTask, say: Say) -> None:
        say(step(1, math.nan))
        say(Failed(error=ErrorBody(code="INTERNAL", reason="LOSS_NOT_FINITE", message="the loss is NaN at step 1")))

    engine = ScriptedEngine(fail)
    async with server(tmp_path, engine) as (hub, manager):
        job = await ended(manager, (await create(hub, manager)).job_id)
        assert job.state is JobState.FAILED
        assert job.error is not None
        assert (job.error.reason, job.error.message) == ("LOSS_NOT_FINITE", "the loss is NaN at step 1")
        said = job_message(job)
        assert (said.error_reason, said.error) == ("LOSS_NOT_FINITE", "the loss is NaN at step 1")
        assert job.progress is not None
        assert math.isnan(job.progress.loss)
        assert notes(await events_of(manager, job.job_id)) == ["the loss is NaN at step 1"]
        assert_nothing_published(hub)


def failing_sync(number: int) -> Callable[[Path], None]:
    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    return fail


async def test_a_failing_disk_while_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server(tmp_path, ScriptedEngine()) as (hub, manager):
        dataset = add_dataset(hub, ROWS)
        monkeypatch.setattr(store_module, "sync", failing_sync(errno.EIO))
        job = await ended(manager, (await manager.create(spec(dataset))).job_id)
        assert job.state is JobState.FAILED
        assert job.error is not None
        assert job.error.reason == "STORAGE_FAILED"
        assert_nothing_published(hub)
        monkeypatch.undo()
        assert (await ended(manager, (await manager.create(spec(dataset))).job_id)).state is JobState.SUCCEEDED


async def paused(manager: JobManager, job_id: str) -> JobRecord:
    for _ in range(500):
        job = await manager.get(job_id)
        if job.state is JobState.PAUSED:
            return job
        await asyncio.sleep(0.01)
    raise AssertionError(f"the job is {job.state}")


async def test_a_full_disk_while_publishing_pauses_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_job, "FIRST_PAUSE_SECONDS", 0.1)
    engine = ScriptedEngine()
    async with server(tmp_path, engine) as (hub, manager):
        dataset = add_dataset(hub, ROWS)
        monkeypatch.setattr(store_module, "sync", failing_sync(errno.ENOSPC))
        job = await paused(manager, (await manager.create(spec(dataset))).job_id)
        assert hub.registry.digests() == set()
        assert "disk is full" in notes(await events_of_now(hub, job.job_id))[0]
        monkeypatch.setattr(store_module, "sync", lambda path: None)
        job = await ended(manager, job.job_id)
        assert job.state is JobState.SUCCEEDED
        assert len(engine.started) == 1, "what was trained is published, not trained again"
        passed = states(await events_of(manager, job.job_id))
        assert passed[:3] == [JobState.PENDING, JobState.RUNNING, JobState.PAUSED]
        assert passed[-2:] == [JobState.RUNNING, JobState.SUCCEEDED]


async def events_of_now(hub: Hub, job_id: str) -> list[JobEventRecord]:
    return list(hub.jobs.events(job_id, 0, 1000)[0])


async def test_a_tuner_that_meets_a_full_disk_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_job, "FIRST_PAUSE_SECONDS", 0.1)
    starts: list[TunerTask] = []

    async def script(job: TunerTask, say: Say) -> None:
        starts.append(job)
        if len(starts) == 1:
            say(step(1))
            body = ErrorBody(code="FAILED_PRECONDITION", reason="DISK_FULL", message="the disk is full")
            say(Failed(error=body))
        else:
            await train(job, say)

    async with server(tmp_path, ScriptedEngine(script)) as (hub, manager):
        free = {"bytes": 0}
        monkeypatch.setattr(hub.store, "free_bytes", lambda: free["bytes"])
        job = await paused(manager, (await create(hub, manager)).job_id)
        await asyncio.sleep(0.3)
        assert len(starts) == 1, "it is not started for nothing"
        free["bytes"] = 1 << 30
        job = await ended(manager, job.job_id)
        assert (job.state, job.error) == (JobState.SUCCEEDED, None)
        assert [start.reported_step for start in starts] == [0, 1]
        events = await events_of(manager, job.job_id)
        reported = [event.event.progress.step for event in events if isinstance(event.event, Progress)]
        assert reported == [1, 2, 3], "the first step was made twice and reported once"


async def test_a_paused_job_can_be_cancelled_and_outlives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(job: TunerTask, say: Say) -> None:
        say(Failed(error=ErrorBody(code="FAILED_PRECONDITION", reason="DISK_FULL", message="the disk is full")))

    async with server(tmp_path, ScriptedEngine(full)) as (hub, manager):
        job = await paused(manager, (await create(hub, manager)).job_id)
        assert (await manager.cancel(job.job_id)).state is JobState.CANCELLED
        second = await paused(manager, (await create(hub, manager)).job_id)
    async with server(tmp_path, ScriptedEngine()) as (_, manager):
        job = await ended(manager, second.job_id)
        assert job.state is JobState.SUCCEEDED
        assert states(await events_of(manager, job.job_id))[-3:] == [
            JobState.PAUSED,
            JobState.RUNNING,
            JobState.SUCCEEDED,
        ]


@pytest.mark.parametrize("kind", ["pickle", "truncated", "missing"])
async def test_what_is_no_artifact_is_not_published(tmp_path: Path, kind: str) -> None:
    async def script(job: TunerTask, say: Say) -> None:
        if kind != "missing":
            leave_artifact(job, b"{" if kind == "truncated" else b"{}")
        if kind == "pickle":
            (Path(job.artifact_dir) / "optimizer.pt").write_bytes(b"x")
        say(Finished(result=RESULT))

    async with server(tmp_path, ScriptedEngine(script)) as (hub, manager):
        job = await ended(manager, (await create(hub, manager)).job_id)
        assert job.state is JobState.FAILED
        assert_nothing_published(hub)


async def test_a_version_that_cannot_be_loaded_is_published_all_the_same(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.load_error = FailedPrecondition("no slot", reason="SLOTS_FULL")
    async with server(tmp_path, engine) as (hub, manager):
        job = await ended(manager, (await create(hub, manager, load=True)).job_id)
        assert job.state is JobState.SUCCEEDED
        assert notes(await events_of(manager, job.job_id)) == ["published, but not loaded: no slot"]
