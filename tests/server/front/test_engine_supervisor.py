"""What happens when the engine ends, or does not start: against a real process."""

# ruff: noqa: F401, F811  # a fixture is imported, and asked for by its name

from __future__ import annotations

import asyncio

import pytest
from tests.server import scripted_engine as script
from tests.server.front.engine_harness import (
    ADAPTER,
    COMMAND,
    Recorder,
    artifact,
    collect,
    engine,
    fast_restarts,
    options,
    sampling,
    until,
)

from graftwork_server.errors import (
    FailedPrecondition,
    GraftworkServerError,
    Internal,
    Unavailable,
)
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.wire.tuning import JobEvent, Note


async def test_a_crash_ends_streams_and_calls_and_a_new_engine_comes(engine):
    recorder = engine._supervisor.listeners[0]
    first = engine.process_id
    hanging = asyncio.create_task(collect(engine.generate([script.HANG, 1], sampling(9))))
    await asyncio.sleep(0.05)
    for task in (hanging, asyncio.create_task(collect(engine.generate([script.CRASH], sampling())))):
        with pytest.raises(Unavailable) as caught:
            await task
        assert caught.value.reason == "ENGINE_RESTARTING"
        assert int(caught.value.metadata["retry_after_ms"]) > 0
    assert not engine.ready
    with pytest.raises(Unavailable):
        await collect(engine.generate([1], sampling()))
    with pytest.raises(Unavailable):
        await engine.load(ADAPTER)
    await until(lambda: engine.ready)
    assert engine.process_id != first
    assert await collect(engine.generate([1], sampling(2))) == [2, 3]
    assert recorder.calls == ["ready", "lost", "ready"]


async def test_a_frame_that_cannot_be_read_leads_to_a_new_engine(engine):
    first = engine.process_id
    with pytest.raises(Unavailable):
        await collect(engine.generate([script.GARBAGE], sampling()))
    await until(lambda: engine.ready)
    assert engine.process_id != first


async def test_the_engine_says_why_it_cannot_start(options):
    client = EngineClient(options(start_failed="there is no model at 'x'"), command=COMMAND)
    with pytest.raises(FailedPrecondition, match="there is no model"):
        await client.start()


async def test_an_engine_that_dies_at_once_is_no_riddle(options):
    client = EngineClient(options(exit_on_start=3), command=COMMAND)
    with pytest.raises(Internal, match="exit code 3"):
        await client.start()


async def test_gives_up_after_five_failures_in_a_row(options):
    client = EngineClient(options(exit_after_ms=20), command=COMMAND)
    await client.start()
    try:
        error = await asyncio.wait_for(client.failure, 20)
        assert isinstance(error, GraftworkServerError)
        assert "5 failures" in error.message
        assert "exit code 9" in error.message
        assert not client.ready
    finally:
        await client.stop()


async def test_a_listener_that_fails_on_news_harms_nobody(engine):
    class Clumsy(Recorder):
        def on_job_event(self, event: JobEvent) -> None:
            raise KeyError("clumsy")

    after = Recorder()
    engine.add_listener(Clumsy())
    engine.add_listener(after)
    before = engine.process_id
    event = JobEvent(job_id="j", event=Note(text="x"))
    engine._dispatch(event)
    assert after.events == [event]
    assert await collect(engine.generate([1], sampling(3))) == [2, 3, 4]
    assert engine.process_id == before


async def test_a_start_that_fails_anyhow_is_tried_again(engine, monkeypatch):
    """No socket or process to be had for a moment: the server does not stay without an engine for ever."""
    launch, failed = engine._process.launch, []

    async def fail_once():
        if not failed:
            failed.append(OSError("no more files"))
            raise failed[0]
        return await launch()

    monkeypatch.setattr(engine._process, "launch", fail_once)
    with pytest.raises(Unavailable):
        await collect(engine.generate([script.CRASH], sampling()))
    await until(lambda: engine.ready)
    assert failed
    assert await collect(engine.generate([1], sampling(3))) == [2, 3, 4]


async def test_another_base_after_a_restart_is_refused(engine, options):
    options(fingerprint="sha256:other")
    with pytest.raises(Unavailable):
        await collect(engine.generate([script.CRASH], sampling()))
    error = await asyncio.wait_for(engine.failure, 20)
    assert "changed while the server ran" in error.message


async def test_inputs_that_end_the_engine_do_not_end_the_server(engine, tmp_path):
    """Ten of them in a row, each another; whoever sends one again is told, and nobody else is."""
    for number in range(10):
        await until(lambda: engine.ready)
        with pytest.raises(Unavailable):
            await engine.inspect(artifact(tmp_path / f"a{number}", "CRASH"), content=str(number))
    await until(lambda: engine.ready)
    assert not engine.failure.done()
    for _ in range(2):
        await until(lambda: engine.ready)
        with pytest.raises(Unavailable):
            await engine.inspect(artifact(tmp_path / "b", "CRASH"), content="b")
    await until(lambda: engine.ready)
    process = engine.process_id
    with pytest.raises(FailedPrecondition) as caught:
        await engine.inspect(artifact(tmp_path / "elsewhere", "CRASH"), content="b")
    assert caught.value.reason == "ENGINE_DIED_BEFORE"
    assert (await engine.inspect(artifact(tmp_path / "c", "fine"), content="c")).rank == 8
    assert await collect(engine.generate([1], sampling(3))) == [2, 3, 4]
    assert engine.process_id == process


async def test_what_was_beside_it_is_not_blamed_for_it(engine, tmp_path):
    """A stream is under way at each death, as a popular one is; an upload that was done in between is forgotten."""
    fine = artifact(tmp_path / "fine", "fine")
    for number in range(4):
        await until(lambda: engine.ready)
        stream = asyncio.create_task(collect(engine.generate([script.HANG, 1], sampling(3))))
        await until(lambda: engine.running)
        beside = asyncio.create_task(engine.inspect(artifact(tmp_path / f"d{number}", "CRASH"), content=str(number)))
        after = asyncio.create_task(engine.inspect(fine, content="fine"))
        for task in (stream, beside, after):
            with pytest.raises(Unavailable):
                await task
        await until(lambda: engine.ready)
        await engine.inspect(fine, content="fine")
    assert not engine.failure.done()


async def test_a_request_that_is_left_before_it_ends_the_engine_counts_too(engine):
    for number in range(6):
        await until(lambda: engine.ready)
        outputs = engine.generate([script.CRASH, number], sampling())
        task = asyncio.create_task(anext(outputs))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await outputs.aclose()
        await until(lambda: not engine.ready)
    await until(lambda: engine.ready)
    assert not engine.failure.done()
