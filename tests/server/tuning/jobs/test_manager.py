"""manager.py: what is taken, in which turn, cancelled and watched, with a real hub and a scripted engine."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from tests.server.tuning.jobs.jobs_harness import assert_nothing_published, create, events_of, spec, states
from tests.server.tuning.jobs.scripted import (
    RESULT,
    ROWS,
    Say,
    ScriptedEngine,
    add_dataset,
    ended,
    leave_artifact,
    never,
    server,
    step,
)
from tests.waiting import until

from graftwork_server.errors import AlreadyExists, FailedPrecondition, GraftworkServerError, InvalidArgument, NotFound
from graftwork_server.types import JobState
from graftwork_server.wire.tuning import Finished, Progress, TunerTask

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


# ------------------------------------------------------------------------------------------- turns and settings


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


# ------------------------------------------------------------------------------------------- watching


async def test_watchers_see_everything_from_where_they_were(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def script(job: TunerTask, say: Say) -> None:
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
