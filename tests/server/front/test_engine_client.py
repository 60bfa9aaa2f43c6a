"""The engine client against a real process that speaks the real protocol (scripted_engine.py), without a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from tests.server import scripted_engine as script

from graftwork_server.errors import (
    FailedPrecondition,
    GraftworkServerError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from graftwork_server.front import engine_supervisor, output_stream
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.types import AdapterRef
from graftwork_server.wire.engine import Sampling
from graftwork_server.wire.tuning import Failed, JobEvent, Note, TunerTask

COMMAND = (sys.executable, script.__file__)
ADAPTER = AdapterRef(digest="sha256:aa", path="unused", strategy="lora")


class Recorder:
    """A listener that notes everything."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.events: list[JobEvent] = []

    def on_engine_ready(self) -> None:
        self.calls.append("ready")

    def on_engine_lost(self) -> None:
        self.calls.append("lost")

    def on_job_event(self, event: JobEvent) -> None:
        self.events.append(event)


@pytest.fixture
def options(tmp_path):
    """Writes the script's options; returns the settings for an EngineClient. Call it again to change them."""

    def write(**values) -> dict:
        path = tmp_path / "scripted"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({"log": str(tmp_path / "log"), **values}))
        return {"model": str(path)}

    return write


@pytest.fixture
async def engine(options):
    client = EngineClient(options(), command=COMMAND)
    client.add_listener(Recorder())
    await client.start()
    yield client
    await client.stop()


@pytest.fixture(autouse=True)
def fast_restarts(monkeypatch):
    monkeypatch.setattr(engine_supervisor, "FIRST_BACKOFF_SECONDS", 0.02)


def heard(tmp_path: Path, kind: str) -> list[dict]:
    """Messages of this kind that the engine got."""
    with contextlib.suppress(FileNotFoundError):
        return [e for e in map(json.loads, (tmp_path / "log").read_text().splitlines()) if e["type"] == kind]
    return []


async def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.005)


async def collect(stream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


def sampling(max_tokens: int = 4, **fields) -> Sampling:
    return Sampling(max_tokens=max_tokens, **fields)


async def test_streams_tokens_until_the_finish(engine):
    outputs = [output async for output in engine.generate([5], sampling(3, logprobs=2))]
    assert [token for output in outputs for token in output.token_ids] == [6, 7, 8]
    assert [output.finish for output in outputs][-1] == "length"
    assert all(len(entry.top) == 2 for output in outputs for entry in output.logprobs)
    assert engine.running == 0


async def test_many_streams_do_not_mix(engine):
    results = await asyncio.gather(*(collect(engine.generate([n], sampling(20))) for n in range(64)))
    assert results == [list(range(n + 1, n + 21)) for n in range(64)]


async def test_a_slow_reader_gets_the_rest_in_one_piece(engine):
    stream = engine.generate([1], sampling(50))
    first = await anext(stream)
    (waiting,) = engine._streams.values()
    await until(lambda: waiting._waiting and waiting._waiting[-1].finish)
    rest = await anext(stream)
    assert first.token_ids + rest.token_ids == list(range(2, 52))
    assert rest.finish == "length"


async def test_a_reader_who_never_reads_is_cut_off_and_cancelled(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(output_stream, "MAX_WAITING_ENTRIES", 30)
    stream = engine.generate([9], sampling(100))
    await anext(stream)
    await until(lambda: engine._streams and next(iter(engine._streams.values()))._error is not None)
    with pytest.raises(ResourceExhausted, match="too slowly"):
        await anext(stream)
    await until(lambda: heard(tmp_path, "Cancel"))


async def test_closing_a_stream_sends_cancel(engine, tmp_path):
    stream = engine.generate([1], sampling(100))
    await anext(stream)
    await stream.aclose()
    await until(lambda: heard(tmp_path, "Cancel"))
    assert heard(tmp_path, "Cancel")[0]["id"] == heard(tmp_path, "Generate")[0]["id"]
    assert engine.running == 0


async def test_cancelling_the_reader_sends_cancel(engine, tmp_path):
    task = asyncio.create_task(collect(engine.generate([script.HANG, 1], sampling(100))))
    await until(lambda: heard(tmp_path, "Generate"))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: heard(tmp_path, "Cancel"))
    assert engine.running == 0


async def test_a_finished_stream_sends_no_cancel(engine, tmp_path):
    await collect(engine.generate([1], sampling(2)))
    await asyncio.sleep(0.05)
    assert not heard(tmp_path, "Cancel")


async def test_an_error_of_the_engine_is_raised_as_it_was(engine):
    with pytest.raises(ResourceExhausted) as caught:
        await collect(engine.generate([script.FAIL], sampling()))
    assert caught.value.reason == "KV_FULL"


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


async def test_calls_get_their_own_answers(engine, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    report, again, info = await asyncio.gather(
        engine.load(ADAPTER), engine.load(ADAPTER), engine.inspect(str(tmp_path), None)
    )
    assert (report.already_loaded, again.already_loaded, info.strategy) == (False, True, "lora")
    await until(lambda: engine.loaded == {"sha256:aa"})
    assert await engine.unload("sha256:aa") is True
    assert await engine.unload("sha256:aa") is False
    await until(lambda: engine.loaded == set())


async def test_an_answer_with_an_error_keeps_its_fields(engine):
    with pytest.raises(InvalidArgument) as caught:
        await engine.prepare_job("lora", {"typo": 1}, 3, 30)
    assert caught.value.violations[0].field == "spec.config.typo"
    assert (await engine.prepare_job("lora", {}, 3, 30)).config["rank"] == 8


async def test_job_events_come_in_order(engine, tmp_path):
    job = TunerTask(
        job_id="j1",
        strategy="lora",
        config={},
        dataset_path="d",
        job_dir=str(tmp_path),
        artifact_dir=str(tmp_path / "artifact"),
    )
    assert await engine.start_job(job) == engine.process_id
    events = engine._supervisor.listeners[0].events
    await until(lambda: len(events) == 7)
    assert [e.event.progress.step for e in events[:3]] == [1, 2, 3]
    assert not isinstance(events[-1].event, Failed)
    assert await engine.stop_job("j1") is True


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


async def test_what_cannot_be_sent_fails_its_own_request(engine):
    """The engine and everybody's streams stay."""
    before = engine.process_id
    stream = asyncio.create_task(collect(engine.generate([1], sampling(30))))
    calls = [
        engine.inspect("\ud800"),
        engine.load(AdapterRef(digest="\udfff", path="x", strategy="lora")),
        engine.prepare_job("lora", {"key": "\ud800"}, 1, 1),
        engine.prepare_job("lora", {"key": 1 << 64}, 1, 1),
        collect(engine.generate([1], sampling(3), cache_salt="\ud800")),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument) as caught:
            await call
        assert caught.value.reason == "MESSAGE_NOT_SENDABLE"
    assert await stream == list(range(2, 32))
    assert engine.process_id == before
    assert not engine._calls
    assert not engine._streams


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


def artifact(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(text)
    return str(folder)


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


async def test_stop_lets_running_sequences_finish(options):
    client = EngineClient(options(), command=COMMAND)
    await client.start()
    task = asyncio.create_task(collect(client.generate([1], sampling(30))))
    await until(lambda: client.running)
    await client.stop(drain_ms=5000)
    assert await task == list(range(2, 32))


async def test_stop_does_not_wait_for_ever(options, monkeypatch):
    monkeypatch.setattr(engine_supervisor, "EXIT_SECONDS", 0.1)
    client = EngineClient(options(), command=COMMAND)
    await client.start()
    task = asyncio.create_task(collect(client.generate([script.HANG, 1], sampling(30))))
    await asyncio.sleep(0.05)
    await client.stop()
    with pytest.raises(Unavailable):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(client.process_id, 0)


async def test_nothing_of_a_connection_has_a_name(options, monkeypatch, tmp_path):
    """What has none cannot be left behind by a kill at any moment, and nobody else can connect to it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    client = EngineClient(options(), command=COMMAND)
    starting = asyncio.create_task(client.start())
    while not starting.done():
        assert os.listdir(tmp_path / "tmp") == []
        await asyncio.sleep(0.005)
    for pid in (os.getpid(), client.process_id):
        assert not [c.laddr for c in psutil.Process(pid).net_connections("unix") if "graftwork" in str(c.laddr)]
    await client.stop()


def test_the_front_imports_no_torch_and_no_hub_library():
    code = (
        "import sys, graftwork_server.front.serve, graftwork_server.front.rpc.server\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
