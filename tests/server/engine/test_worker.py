"""The engine as a process, driven by the front's own client over the real socket, with the real plugins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from tests import toys

from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.types import AdapterRef
from graftwork_server.wire.engine import EngineMessage, Reply, Sampling

GREEDY = Sampling(max_tokens=8, ignore_eos=True)


def settings(model: Path, cache: Path, /, **changes: Any) -> dict[str, Any]:
    values = {"model": str(model), "device": "cpu", "dtype": "float32", "threads": 1, "data_dir": str(cache)}
    return values | {"max_sequences": 4, "max_step_tokens": 64, "log_level": "warning"} | changes


@pytest.fixture(scope="module")
def adapters(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [toys.make_adapter(llama_dir, folder / f"a{seed}", seed) for seed in range(3)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineClient]:
    client = EngineClient(settings(llama_dir, tmp_path_factory.mktemp("cache")))
    await client.start()
    yield client
    await client.stop()


pytestmark = pytest.mark.asyncio(loop_scope="module")


def ref(path: Path, digest: str = "") -> AdapterRef:
    return AdapterRef(digest=digest or path.name, path=str(path), strategy="lora")


async def tokens(engine: EngineClient, adapter: AdapterRef | None, sampling: Sampling = GREEDY) -> list[int]:
    found: list[int] = []
    async for output in engine.generate([5, 6, 7], sampling, adapter):
        found.extend(output.token_ids)
    return found


async def test_adapters_load_on_demand_once_for_all_waiters(engine: EngineClient, adapters: list[Path]) -> None:
    answers = await asyncio.gather(*(tokens(engine, ref(adapters[0])) for _ in range(6)), tokens(engine, None))
    assert len({tuple(answer) for answer in answers[:6]}) == 1
    assert answers[6] != answers[0]
    assert engine.loaded == {"a0"}
    report = await engine.load(ref(adapters[0]))
    assert report.already_loaded
    assert (report.modules_bound, report.rank) == (21, 8)


async def test_load_unload_load_gives_the_same_answers(engine: EngineClient, adapters: list[Path]) -> None:
    report = await engine.load(ref(adapters[1]))
    assert not report.already_loaded
    assert report.load_ms > 0
    first = await tokens(engine, ref(adapters[1]))
    assert await engine.unload("a1")
    assert "a1" not in engine.loaded
    assert not await engine.unload("a1")
    assert await tokens(engine, ref(adapters[1])) == first


async def test_what_is_loaded_is_told_before_the_answer(
    engine: EngineClient, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever awaits the answer may look at the list a frame later or several: its frame must be first."""
    seen: list[bool] = []
    dispatch = engine._dispatch

    def spy(message: EngineMessage) -> None:
        dispatch(message)
        if isinstance(message, Reply):
            seen.append("told" in engine.loaded)

    monkeypatch.setattr(engine, "_dispatch", spy)
    adapter = ref(adapters[1], "told")
    await engine.load(adapter)
    await engine.load(adapter)
    await engine.unload("told")
    await engine.unload("told")
    await asyncio.gather(engine.load(adapter), engine.unload("told"))
    assert seen == [True, True, False, False, True, False]
    assert "told" not in engine.loaded


async def test_what_is_pinned_is_not_unloaded(engine: EngineClient, adapters: list[Path]) -> None:
    """Whoever unloads looked at the pins before; one may have come since."""
    await engine.load(ref(adapters[1], "kept"))
    await engine.pin(["kept"])
    with pytest.raises(FailedPrecondition) as raised:
        await engine.unload("kept")
    assert (raised.value.reason, "kept" in engine.loaded) == ("ADAPTER_PINNED", True)
    await engine.pin([])
    assert await engine.unload("kept")


async def test_unload_waits_for_the_stream_that_uses_it(engine: EngineClient, adapters: list[Path]) -> None:
    stream = engine.generate([5, 6, 7], Sampling(max_tokens=200, ignore_eos=True), ref(adapters[2]))
    received = len((await anext(stream)).token_ids)
    unloading = asyncio.create_task(engine.unload("a2"))
    async for output in stream:
        received += len(output.token_ids)
    assert received == 200
    assert await unloading
    assert "a2" not in engine.loaded


async def test_unload_waits_for_the_load_under_way(engine: EngineClient, adapters: list[Path]) -> None:
    load = asyncio.create_task(engine.load(ref(adapters[2], "brief")))
    await asyncio.sleep(0)
    assert await engine.unload("brief")
    assert (await load).modules_bound == 21
    again = await engine.load(ref(adapters[2], "brief"))
    assert not again.already_loaded
    assert await engine.unload("brief")


async def test_a_load_that_nobody_needs_gives_up_its_turn(
    llama_dir: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """One place, taken by a long stream; the only request for another adapter is cancelled."""
    client = EngineClient(settings(llama_dir, tmp_path, adapter_memory_bytes=4 * 8 * 3 * 704))
    await client.start()
    try:
        long = client.generate([5, 6], Sampling(max_tokens=240, ignore_eos=True), ref(adapters[0]))
        await anext(long)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(tokens(client, ref(adapters[1])), 0.02)
        again = client.generate([5, 6], Sampling(max_tokens=2, ignore_eos=True), ref(adapters[0]))
        assert [output async for output in again]
        async for _ in long:
            pass
        assert client.loaded == {"a0"}
    finally:
        await client.stop()


async def test_closing_a_stream_frees_its_place(engine: EngineClient) -> None:
    """Four places: four closed streams of 200 tokens each must not keep the next four waiting for their ends."""
    for _ in range(3):
        streams = [engine.generate([5, 6], Sampling(max_tokens=240, ignore_eos=True)) for _ in range(4)]
        for stream in streams:
            await anext(stream)
            await stream.aclose()
    assert len(await tokens(engine, None)) == 8
    assert engine.running == 0


async def test_more_adapters_than_places_take_turns(llama_dir: Path, adapters: list[Path], tmp_path: Path) -> None:
    """One place for three adapters, two of which are asked without a pause: the third gets its turn."""
    client = EngineClient(settings(llama_dir, tmp_path, adapter_memory_bytes=4 * 8 * 3 * 704))
    await client.start()
    done = asyncio.Event()

    async def insist(adapter: AdapterRef) -> set[tuple[int, ...]]:
        answers: set[tuple[int, ...]] = set()
        while not done.is_set():
            answers.add(tuple(await tokens(client, adapter)))
        return answers

    try:
        busy = [asyncio.create_task(insist(ref(adapters[index % 2]))) for index in range(6)]
        await asyncio.sleep(0.5)
        third = [await asyncio.wait_for(tokens(client, ref(adapters[2])), 60) for _ in range(4)]
        done.set()
        answers = await asyncio.gather(*busy)
    finally:
        await client.stop()
    alone = [len(own) for own in answers]
    assert alone == [1] * 6, "each adapter always gives its own answer"
    assert answers[0] != answers[1]
    assert len({tuple(answer) for answer in third}) == 1


async def test_unloaded_and_evicted_adapters_give_their_memory_back(llama_dir: Path, tmp_path: Path) -> None:
    """Sixty loads of 4.3 MB each, all under digests of their own."""
    directory = toys.make_adapter(llama_dir, tmp_path / "wide", r=512)
    size = 4 * 512 * 3 * 704
    limits = {"adapter_memory_bytes": 4 * size, "host_cache_bytes": 2 * size}
    client = EngineClient(settings(llama_dir, tmp_path / "cache", **limits))
    await client.start()
    try:
        process = psutil.Process(client.process_id)
        for number in range(8):  # pool and host cache are full
            report = await client.load(ref(directory, f"first-{number}"))
            assert report.device_bytes == size
        before = process.memory_info().rss
        for number in range(60):
            await client.load(ref(directory, f"d{number}"))
            if number % 3 == 0:
                await client.unload(f"d{number}")
        await client.pin([])  # the engine's own list follows its answer to a load, and comes before this one
        assert len(client.loaded) <= 4
        assert process.memory_info().rss - before < 15 * size
    finally:
        await client.stop()


async def test_a_bad_artifact_fails_its_own_requests_only(
    engine: EngineClient, adapters: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in adapters[0].iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    config = json.loads((bad / "adapter_config.json").read_text()) | {"use_dora": True}
    (bad / "adapter_config.json").write_text(json.dumps(config))
    good, failed = await asyncio.gather(tokens(engine, None), tokens(engine, ref(bad)), return_exceptions=True)
    assert isinstance(good, list)
    assert isinstance(failed, FailedPrecondition)
    assert "use_dora" in failed.message
    with pytest.raises(FailedPrecondition, match="use_dora"):
        await engine.inspect(str(bad), None)
    with pytest.raises(FailedPrecondition, match="use_dora"):
        await engine.load(ref(bad, "other"))


async def test_inspect_says_what_is_in_an_artifact(engine: EngineClient, adapters: list[Path]) -> None:
    info = await engine.inspect(str(adapters[0]), None)
    assert (info.strategy, info.rank, info.modules_bound) == ("lora", 8, 21)
    assert "never-loaded" not in engine.loaded


async def test_prepare_fills_defaults_and_names_wrong_keys(engine: EngineClient) -> None:
    prepared = await engine.prepare_job("lora", {"r": 4.0}, 100, 2000)
    assert prepared.config["r"] == 4
    assert prepared.config["lora_alpha"] == 32
    assert prepared.estimate.trained_parameters > 0
    with pytest.raises(InvalidArgument) as raised:
        await engine.prepare_job("lora", {"rank": 4}, 100, 2000)
    assert [violation.field for violation in raised.value.violations] == ["spec.config.rank"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "does/not/exist"}, "it is not a directory"),
        ({"model": "/"}, "it has no config.json"),
        ({"model": "nobody/nothing"}, "its files are not in the local cache"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
async def test_an_engine_that_cannot_start_says_why(
    llama_dir: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    client = EngineClient(settings(llama_dir, tmp_path, **changes))
    with pytest.raises(GraftworkServerError, match=says):
        await client.start()
