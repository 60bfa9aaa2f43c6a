"""Jobs outlive engines and servers: those that are lost, stopped and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.server.tuning.jobs.jobs_harness import assert_nothing_published, create, events_of, notes
from tests.server.tuning.jobs.scripted import MODEL, STRATEGIES, Say, ScriptedEngine, ended, never, server, train
from tests.waiting import until

from graftwork_server.errors import Unavailable
from graftwork_server.hub.files.manifest import digest_of
from graftwork_server.hub.hub import Hub
from graftwork_server.types import JobState
from graftwork_server.wire.tuning import Checkpointed, TunerTask


async def test_a_lost_engine_resumes_the_job(tmp_path: Path) -> None:
    engine = ScriptedEngine(never)
    async with server(tmp_path, engine) as (hub, manager):
        job = await create(hub, manager)
        await until(lambda: engine.started)
        engine.die()
        await asyncio.sleep(0.05)
        assert len(engine.started) == 1
        engine.script = train
        engine.return_()
        done = await ended(manager, job.job_id)
        assert done.state is JobState.SUCCEEDED
        assert notes(await events_of(manager, job.job_id)) == ["the engine ended under the job", "resumed"]
        assert engine.started[0].job_dir == engine.started[1].job_dir


async def test_a_job_that_ends_engines_is_given_up(tmp_path: Path) -> None:
    async def deadly(job: TunerTask, say: Say) -> None:
        if len(engine.started) == 2:
            say(Checkpointed(step=1))  # progress: the count begins anew
        asyncio.get_running_loop().call_later(0.01, engine.die)
        asyncio.get_running_loop().call_later(0.02, engine.return_)

    engine = ScriptedEngine(deadly)
    async with server(tmp_path, engine) as (hub, manager):
        job = await ended(manager, (await create(hub, manager)).job_id)
        assert job.error is not None
        assert (job.state, job.error.reason) == (JobState.FAILED, "ENGINE_LOST_REPEATEDLY")
        assert len(engine.started) == 4
        assert_nothing_published(hub)


async def test_an_engine_that_dies_while_starting_counts_once(tmp_path: Path) -> None:
    async def script(job: TunerTask, say: Say) -> None:
        if len(engine.started) == 1:
            engine.die()
            asyncio.get_running_loop().call_later(0.01, engine.return_)
        else:
            await train(job, say)

    engine = ScriptedEngine(script)
    async with server(tmp_path, engine) as (hub, manager):
        job = await ended(manager, (await create(hub, manager)).job_id)
        assert job.state is JobState.SUCCEEDED
        assert len(engine.started) == 2


async def test_a_stopped_server_resumes_at_its_next_start(tmp_path: Path) -> None:
    async with server(tmp_path, ScriptedEngine(never)) as (hub, manager):
        job = await create(hub, manager)
        await until(lambda: manager._hub.jobs.get(job.job_id).progress)
        watcher = asyncio.create_task(events_of(manager, job.job_id))
        await asyncio.sleep(0.05)
    with pytest.raises(Unavailable):
        await watcher
    engine = ScriptedEngine()
    async with server(tmp_path, engine) as (hub, manager):
        done = await ended(manager, job.job_id)
        assert done.state is JobState.SUCCEEDED
        assert notes(await events_of(manager, job.job_id)) == ["resumed"]


@pytest.mark.parametrize("what", ["base", "strategy", "dataset"])
async def test_a_job_whose_ground_is_gone_fails_plainly(tmp_path: Path, what: str) -> None:
    async with server(tmp_path, ScriptedEngine(never)) as (hub, manager):
        job = await create(hub, manager)
        await until(lambda: manager._hub.jobs.get(job.job_id).progress)
        dataset = hub.store.dataset_path(job.spec.dataset_id)
    options: dict[str, Any] = {}
    if what == "base":
        options["model"] = msgspec.structs.replace(MODEL, fingerprint="sha256:other")
    elif what == "strategy":
        options["strategies"] = lambda: STRATEGIES[1:]
    else:
        dataset.unlink()
    engine = ScriptedEngine()
    async with server(tmp_path, engine, **options) as (hub, manager):
        done = await ended(manager, job.job_id)
        assert done.state is JobState.FAILED
        assert done.error is not None
        reasons = {"base": "BASE_MISMATCH", "strategy": "STRATEGY_NOT_FOUND", "dataset": "DATASET_NOT_FOUND"}
        assert done.error.reason == reasons[what]
        assert engine.started == []
        assert_nothing_published(hub)


@pytest.mark.parametrize(
    "failpoint",
    [
        "publish.announced",
        "publish.before_rename",
        "publish.after_rename",
        "publish.before_commit",
        "publish.after_commit",
    ],
)
async def test_killed_while_publishing(tmp_path: Path, failpoint: str) -> None:
    command = [sys.executable, str(Path(__file__).parent / "scripted.py"), str(tmp_path)]
    environment = os.environ | {"GRAFTWORK_FAILPOINT": failpoint}
    killed = await asyncio.to_thread(subprocess.run, command, env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL

    committed = failpoint == "publish.after_commit"
    engine = ScriptedEngine(never)
    hub = Hub(tmp_path)
    assert len(hub.registry.digests()) == committed
    hub.close()
    async with server(tmp_path, engine) as (hub, manager):
        (job,) = (await manager.list())[0]
        done = await ended(manager, job.job_id)
        assert done.state is JobState.SUCCEEDED
        assert engine.started == []  # what was trained was not lost
        version = hub.registry.get_version("a")
        assert version.number == 1
        assert digest_of(hub.store.artifact_path(version.digest)) == version.digest
        assert len(os.listdir(hub.store.artifacts)) == 1
        await until(lambda: os.listdir(hub.store.jobs) == [])
        sequences = [event.sequence for event in await events_of(manager, job.job_id)]
        assert sequences == list(range(1, len(sequences) + 1))
