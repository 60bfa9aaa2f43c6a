"""The engine client against a real process that speaks the real protocol (scripted_engine.py), without a model."""

# ruff: noqa: F401, F811  # a fixture is imported, and asked for by its name

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile

import psutil
import pytest
from tests.server import scripted_engine as script
from tests.server.front.engine_harness import (
    ADAPTER,
    COMMAND,
    artifact,
    collect,
    engine,
    fast_restarts,
    heard,
    options,
    sampling,
    until,
)

from graftwork_server.errors import (
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from graftwork_server.front import engine_supervisor, output_stream
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.types import AdapterRef
from graftwork_server.wire.tuning import Failed, TunerTask


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
