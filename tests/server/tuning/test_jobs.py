"""tuning/jobs/ with a real hub, a scripted engine and servers that are killed."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.server.tuning.scripted import (
    ESTIMATE,
    MODEL,
    RESULT,
    ROWS,
    STRATEGIES,
    ScriptedEngine,
    add_dataset,
    ended,
    leave_artifact,
    never,
    server,
    step,
    train,
)

from graftwork_server.errors import (
    AlreadyExists,
    ErrorBody,
    FailedPrecondition,
    GraftworkServerError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from graftwork_server.front.rpc.convert import job_message
from graftwork_server.hub.database.records import JobEventRecord, JobRecord, StateChanged, TuningJobSpec
from graftwork_server.hub.files import store as store_module
from graftwork_server.hub.files.manifest import digest_of
from graftwork_server.hub.hub import Hub
from graftwork_server.tuning.jobs import running_job
from graftwork_server.tuning.jobs.manager import JobManager
from graftwork_server.types import JobState
from graftwork_server.wire.tuning import Checkpointed, Failed, Finished, JobSpec, Note, Progress, TunerEvent

Say = Callable[[TunerEvent], None]


def spec(dataset_id: str, **changes: Any) -> TuningJobSpec:
    return TuningJobSpec(**({"strategy": "lora", "dataset_id": dataset_id, "adapter_id": "a"} | changes))


async def create(hub: Hub, manager: JobManager, **changes: Any) -> JobRecord:
    return await manager.create(spec(**({"dataset_id": add_dataset(hub, ROWS)} | changes)))


async def events_of(manager: JobManager, job_id: str, after: int = 0) -> list[JobEventRecord]:
    return [event async for event in manager.watch(job_id, after)]


def states(events: list[JobEventRecord]) -> list[JobState]:
    return [event.event.state for event in events if isinstance(event.event, StateChanged)]


def notes(events: list[JobEventRecord]) -> list[str]:
    return [event.event.text for event in events if isinstance(event.event, Note)]


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


def assert_nothing_published(hub: Hub) -> None:
    assert hub.registry.digests() == set()
    assert os.listdir(hub.store.artifacts) == []
    assert os.listdir(hub.store.jobs) == []


# ------------------------------------------------------------------------------------------- what a name serves


async def test_a_job_replaces_no_adapter_unless_it_is_told_to(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    async with server(tmp_path, engine) as (hub, manager):
        first = await ended(manager, (await create(hub, manager, new_version=False)).job_id)
        assert (first.follows, first.adapter_version) == (0, "adapters/a/versions/1")
        with pytest.raises(AlreadyExists) as caught:
            await manager.create(spec("ds-that-is-not-even-there", new_version=False))
        assert caught.value.reason == "ADAPTER_EXISTS"
        assert caught.value.violations[0].field == "spec.adapter_id"
        assert "new_version" in caught.value.message
        job = await create(hub, manager, new_version=True, config={"lr": 2.0})
        assert job.follows == 1
        second = await ended(manager, job.job_id)
        assert (second.follows, second.adapter_version) == (1, "adapters/a/versions/2")
        assert hub.registry.get_version("a").follows == 1


async def test_an_id_that_a_job_will_publish_is_promised_to_it(tmp_path: Path) -> None:
    async with server(tmp_path, ScriptedEngine(never)) as (hub, manager):
        job = await create(hub, manager, new_version=False)
        for new_version in (False, True):
            with pytest.raises(AlreadyExists, match=job.job_id) as caught:
                await create(hub, manager, new_version=new_version)
            assert caught.value.reason == "ADAPTER_EXISTS"
            with pytest.raises(AlreadyExists, match=job.job_id):
                hub.registry.check_target("a", may_exist=new_version)
        hub.registry.check_target("b", may_exist=False)
        await manager.cancel(job.job_id)
        hub.registry.check_target("a", may_exist=False)


async def test_jobs_that_all_want_the_next_version_may_wait_for_one_another(tmp_path: Path) -> None:
    async with server(tmp_path, ScriptedEngine(never)) as (hub, manager):
        for _ in range(2):
            await create(hub, manager, new_version=True)
        hub.registry.check_target("a", may_exist=True)
        with pytest.raises(AlreadyExists):
            await create(hub, manager, new_version=False)


# ------------------------------------------------------------------------------------------- from start to end


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


async def test_jobs_wait_for_their_turn(tmp_path: Path) -> None:
    engine = ScriptedEngine(never)
    async with server(tmp_path, engine, max_concurrent_jobs=2) as (hub, manager):
        jobs = [await create(hub, manager, adapter_id=f"a{n}") for n in range(4)]
        await until(lambda: len(engine.started) == 2)
        await asyncio.sleep(0.05)
        assert [job.job_id for job in engine.started] == [jobs[0].job_id, jobs[1].job_id]
        await manager.cancel(jobs[0].job_id)
        await until(lambda: len(engine.started) == 3)
        assert engine.started[2].job_id == jobs[2].job_id
        page, token = await manager.list(3)
        assert [job.job_id for job in page] == [job.job_id for job in reversed(jobs[1:])]
        assert [job.job_id for job in (await manager.list(3, token))[0]] == [jobs[0].job_id]


async def test_counts_are_those_of_the_rows_that_are_trained_on(tmp_path: Path) -> None:
    engine = ScriptedEngine(never)
    async with server(tmp_path, engine) as (hub, manager):
        await create(hub, manager)
        await create(hub, manager, validation_fraction=0.2)
        await create(hub, manager, config={"max_sequence_tokens": 6})
        (rows, tokens), (kept, fewer), (_, cut) = engine.prepared
        assert (rows, kept) == (10, 8)
        assert fewer == math.ceil(tokens * 0.8)
        assert cut == 60 < tokens


async def test_what_was_set_and_chosen_is_in_the_record(tmp_path: Path) -> None:
    engine = ScriptedEngine(never)
    async with server(tmp_path, engine) as (hub, manager):
        many = add_dataset(hub, [{"prompt": f"{n} ->", "completion": "x"} for n in range(100)])
        job = await manager.create(spec(many))
        assert job.spec.validation_fraction == 0.1
        assert engine.prepared[-1][0] == 90
        assert [choice.key for choice in job.spec.choices] == ["validation_fraction", "rank"]
        assert "10 of 100 rows" in job.spec.choices[0].reason
        assert (await manager.get(job.job_id)).spec == job.spec
        assert engine.held_out == [10]
        await until(lambda: len(engine.started) == 1)
        assert engine.started[0].validation_fraction == 0.1

        explicit = await manager.create(spec(many, validation_fraction=0.0))
        assert (explicit.spec.validation_fraction, engine.prepared[-1][0], engine.held_out[-1]) == (0.0, 100, 0)
        assert (explicit.spec.choices[0].automatic, explicit.spec.choices[0].value) == (False, 0.0)
        fixed = await manager.create(spec(many, config={"max_steps": 40}))
        assert (fixed.spec.validation_fraction, engine.prepared[-1][0], engine.held_out[-1]) == (0.0, 100, 0)
        few = await create(hub, manager)
        assert (few.spec.validation_fraction, engine.prepared[-1][0], engine.held_out[-1]) == (0.0, 10, 0)
        given = await manager.create(spec(many, validation_dataset_id=add_dataset(hub, ROWS)))
        assert (given.spec.validation_fraction, engine.prepared[-1][0], engine.held_out[-1]) == (0.0, 100, 10)
        assert [choice.key for choice in given.spec.choices] == ["rank"]


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(({"adapter_id": id}, "spec.adapter_id") for id in ("base", "", "../x", "a\n", "ü", "a@1", "a" * 65)),
        *(
            ({"validation_fraction": value}, "spec.validation_fraction")
            for value in (-0.1, 0.51, math.nan, math.inf, -math.inf)
        ),
        ({"validation_fraction": 0.1, "validation_dataset_id": "ds-1"}, "spec.validation_fraction"),
        ({"dataset_id": ""}, "spec.dataset"),
        ({"dataset_id": "ds-0"}, "spec.dataset"),
        ({"dataset_id": "../../etc/passwd"}, "spec.dataset"),
        ({"validation_dataset_id": "ds-0"}, "spec.validation_dataset"),
        ({"strategy": "none"}, "spec.strategy"),
        ({"strategy": "fixed"}, "spec.strategy"),
        ({"strategy": "broken"}, "spec.strategy"),
        ({"config": {"bad": 1}}, "spec.config.bad"),
    ],
)
async def test_bad_jobs_are_refused_by_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    async with server(tmp_path, ScriptedEngine()) as (hub, manager):
        with pytest.raises(GraftworkServerError) as caught:
            await create(hub, manager, **changes)
        assert caught.value.code in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION")
        assert [violation.field for violation in caught.value.violations] == [field]
        assert (await manager.list())[0] == []


async def test_datasets_that_cannot_be_trained_on_are_refused(tmp_path: Path) -> None:
    async with server(tmp_path, ScriptedEngine()) as (hub, manager):
        bad = add_dataset(hub, [*ROWS, {"prompt": 1, "completion": "x"}, {"unknown": 1}])
        with pytest.raises(InvalidArgument) as caught:
            await manager.create(spec(bad))
        assert caught.value.reason == "DATASET_INVALID"
        assert [violation.field for violation in caught.value.violations] == [
            "spec.dataset: line 11",
            "spec.dataset: line 12",
        ]
        long = add_dataset(hub, [{"prompt": "x" * 100, "completion": "y"}])
        with pytest.raises(InvalidArgument) as caught:
            await manager.create(spec(long))
        assert caught.value.reason == "DATASET_NO_LOSS"
        with pytest.raises(InvalidArgument):
            await manager.create(spec(add_dataset(hub, ROWS), validation_dataset_id=bad))
    async with server(tmp_path, ScriptedEngine(), text=None) as (hub, manager):
        with pytest.raises(FailedPrecondition) as refused:
            await create(hub, manager)
        assert refused.value.reason == "TOKENIZER_MISSING"


async def test_a_repeated_request_creates_one_job(tmp_path: Path) -> None:
    engine = ScriptedEngine(never)
    async with server(tmp_path, engine) as (hub, manager):
        wanted = spec(add_dataset(hub, ROWS))
        jobs = await asyncio.gather(*(manager.create(wanted, "r1") for _ in range(5)))
        assert len({job.job_id for job in jobs}) == 1
        with pytest.raises(InvalidArgument) as caught:
            await manager.create(spec(wanted.dataset_id, adapter_id="b"), "r1")
        assert caught.value.reason == "REQUEST_ID_REUSED"
        assert len((await manager.list())[0]) == 1


async def test_unknown_jobs(tmp_path: Path) -> None:
    async with server(tmp_path, ScriptedEngine()) as (_, manager):
        for call in (manager.get("x"), manager.cancel("x"), events_of(manager, "x")):
            with pytest.raises(NotFound):
                await call
        assert manager._changed == {}


# ------------------------------------------------------------------------------------------- failures


async def test_a_failed_tuner_fails_its_job(tmp_path: Path) -> None:
    async def fail(job: JobSpec, say: Say) -> None:
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
    starts: list[JobSpec] = []

    async def script(job: JobSpec, say: Say) -> None:
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
    async def full(job: JobSpec, say: Say) -> None:
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
    async def script(job: JobSpec, say: Say) -> None:
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


# ------------------------------------------------------------------------------------------- cancel


async def test_cancel_stops_the_tuner_and_publishes_nothing(tmp_path: Path) -> None:
    engine = ScriptedEngine(never)
    async with server(tmp_path, engine) as (hub, manager):
        job = await create(hub, manager)
        await until(lambda: engine.started)
        waiting = await create(hub, manager, adapter_id="b")
        assert (await manager.cancel(waiting.job_id)).state is JobState.CANCELLED
        assert (await manager.cancel(job.job_id)).state is JobState.CANCELLED
        assert (await manager.cancel(job.job_id)).state is JobState.CANCELLED
        assert engine.stopped == [job.job_id]
        assert states(await events_of(manager, job.job_id))[-1] is JobState.CANCELLED
        assert_nothing_published(hub)


async def test_an_ended_job_cannot_be_cancelled(tmp_path: Path) -> None:
    async with server(tmp_path, ScriptedEngine()) as (hub, manager):
        job = await ended(manager, (await create(hub, manager)).job_id)
        with pytest.raises(FailedPrecondition) as caught:
            await manager.cancel(job.job_id)
        assert caught.value.reason == "JOB_ENDED"


async def test_cancel_races_with_the_end(tmp_path: Path) -> None:
    """However it goes, the answer, the state and the versions agree."""
    async with server(tmp_path, ScriptedEngine()) as (hub, manager):
        outcomes = set()
        for n in range(8):
            job = await create(hub, manager, adapter_id=f"a{n}")
            await asyncio.sleep(0.05 * n)
            try:
                state = (await manager.cancel(job.job_id)).state
            except FailedPrecondition:
                state = JobState.SUCCEEDED
            outcomes.add(state)
            assert (await manager.get(job.job_id)).state is state
            names = [version.adapter_id for version in hub.registry.list_adapters()[0]]
            assert (f"a{n}" in names) == (state is JobState.SUCCEEDED)
        assert outcomes == {JobState.CANCELLED, JobState.SUCCEEDED}


# ------------------------------------------------------------------------------------------- engine and restarts


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
    async def deadly(job: JobSpec, say: Say) -> None:
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
    async def script(job: JobSpec, say: Say) -> None:
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


# ------------------------------------------------------------------------------------------- watching


async def test_watchers_see_everything_from_where_they_were(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def script(job: JobSpec, say: Say) -> None:
        async def later() -> None:
            for number in range(1, 701):
                say(step(number))
                if number == 350:
                    await go.wait()
            leave_artifact(job)
            say(Finished(result=RESULT))

        tasks.append(asyncio.create_task(later()))

    tasks: list[asyncio.Task[None]] = []
    async with server(tmp_path, ScriptedEngine(script)) as (hub, manager):
        job = await create(hub, manager)
        watchers = [asyncio.create_task(events_of(manager, job.job_id, after)) for after in (0, 0, 100, 5000)]
        await until(lambda: manager._hub.jobs.get(job.job_id).progress)
        slow = manager.watch(job.job_id)
        first = await anext(slow)
        go.set()
        everything, same, tail, nothing = await asyncio.gather(*watchers)
        assert [event.sequence for event in everything] == list(range(1, 704))
        assert same == everything
        assert tail == everything[100:]
        assert nothing == []
        assert [first, *[event async for event in slow]] == everything
        steps = [event.event.progress.step for event in everything if isinstance(event.event, Progress)]
        assert steps == list(range(1, 701))
        assert manager._changed == {}
        with pytest.raises(InvalidArgument):
            await events_of(manager, job.job_id, -1)
