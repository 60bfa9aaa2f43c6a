"""AdapterService: adapters and their versions are brought, named, listed, loaded, pinned and deleted."""

from __future__ import annotations

import asyncio
import time

import grpc
from tests.server.front.rpc.adapter_harness import create, files_of, generate, get, staged
from tests.waiting import until

from graftwork.v1 import adapters_pb2 as pb
from graftwork.v1 import generation_pb2


async def pin(server, adapter_id):
    return await server.adapters.PinAdapter(pb.PinAdapterRequest(name=f"adapters/{adapter_id}"))


async def test_an_uploaded_adapter_answers_by_name(server):
    answer = await create(server, "tuned.v2", load=True)
    adapter = answer.adapter
    assert (adapter.name, adapter.adapter_id, adapter.version) == ("adapters/tuned.v2", "tuned.v2", 1)
    assert (adapter.strategy, adapter.rank, adapter.parameter_count, adapter.loaded) == ("lora", 8, 64, True)
    assert adapter.digest.startswith("sha256:")
    assert adapter.base_fingerprint == server.front.engine.model.fingerprint
    assert answer.load_report.modules_bound == 4
    assert answer.load_report.load_ms > 0
    messages = await generate(server, "tuned.v2")
    assert (messages[0].model, messages[0].version, messages[-1].version) == ("tuned.v2", 1, 1)
    assert server.heard("Generate")[0]["adapter"] == adapter.digest
    assert (await get(server, "adapters/tuned.v2")).adapter == adapter
    assert staged(server) == []
    assert server.front._hub.leases.count == 0


async def test_versions_are_added_and_named(server, refused):
    await create(server, "a", files_of("1"))
    error = await refused(create(server, "a", files_of("2")))
    assert (error.code, error.reason) == ("ALREADY_EXISTS", "ADAPTER_EXISTS")
    second = (await create(server, "a", files_of("2"), new_version=True)).adapter
    assert second.version == 2
    assert (await get(server, "adapters/a")).adapter.version == 2
    assert (await get(server, "adapters/a/versions/1")).adapter.version == 1
    assert (await refused(get(server, "adapters/a/versions/3"))).code == "NOT_FOUND"
    assert (await generate(server, "a@1"))[0].version == 1
    assert (await generate(server, "a"))[0].version == 2
    assert (
        await refused(server.generation.Generate(generation_pb2.GenerateRequest(model="a@3", text="x")))
    ).code == "NOT_FOUND"


async def test_one_version_is_deleted(server, refused):
    for seed in ("one", "two", "three"):
        await create(server, "a", files_of(seed), new_version=True)
    digest = (await get(server, "adapters/a/versions/3")).adapter.digest.removeprefix("sha256:")
    await server.adapters.LoadAdapter(pb.LoadAdapterRequest(name="adapters/a"))

    async def delete(number):
        return await server.adapters.DeleteVersion(pb.DeleteVersionRequest(name=f"adapters/a/versions/{number}"))

    assert (await delete(3)).newest_version == 2
    await until(lambda: not server.front.engine.loaded)
    assert not (server.data / "artifacts" / digest).exists()
    assert (await get(server, "adapters/a")).adapter.version == 2
    assert (await generate(server, "a"))[-1].version == 2
    assert (await refused(delete(3))).reason == "VERSION_NOT_FOUND"
    for name in ("adapters/a", "adapters/a/versions/latest"):
        error = await refused(server.adapters.DeleteVersion(pb.DeleteVersionRequest(name=name)))
        assert error.reason == "INVALID_NAME"
    assert (await delete(1)).newest_version == 2
    assert (await delete(2)).newest_version == 0
    assert (await refused(get(server, "adapters/a"))).reason == "ADAPTER_NOT_FOUND"
    assert (await create(server, "a", files_of("four"))).adapter.version == 4


async def test_the_latest_version_has_a_name(server, refused):
    await create(server, "a", files_of("one"))
    await create(server, "a", files_of("two"), new_version=True)
    assert (await get(server, "adapters/a/versions/latest")).adapter.version == 2
    assert (await generate(server, "a@latest"))[-1].version == 2
    error = await refused(generate(server, "a@newest"))
    assert '"latest" is the newest' in error.message


async def test_the_same_request_id_creates_once(server, refused):
    first = await create(server, "a", request_id="r-1")
    again = await create(server, "a", request_id="r-1")
    assert again.adapter == first.adapter
    error = await refused(create(server, "b", request_id="r-1"))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "REQUEST_ID_REUSED")
    assert "request_id" in next(iter((await refused(create(server, "c", request_id="a b"))).fields))


async def test_adapters_are_listed_a_page_at_a_time(server):
    for name in ("b", "a", "c"):
        await create(server, name)
    first = await server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2))
    assert [a.adapter_id for a in first.adapters] == ["a", "b"]
    second = await server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2, page_token=first.next_page_token))
    assert ([a.adapter_id for a in second.adapters], second.next_page_token) == (["c"], "")


async def test_versions_are_listed_newest_first(server, refused):
    for seed in ("1", "2", "3"):
        await create(server, "a", files_of(seed), new_version=True)
    await create(server, "b")
    await server.adapters.PinAdapter(pb.PinAdapterRequest(name="adapters/a/versions/1"))
    first = await server.adapters.ListVersions(pb.ListVersionsRequest(parent="adapters/a", page_size=2))
    assert [version.version for version in first.versions] == [3, 2]
    assert not any(version.loaded or version.pinned for version in first.versions)
    second = await server.adapters.ListVersions(
        pb.ListVersionsRequest(parent="adapters/a", page_size=2, page_token=first.next_page_token)
    )
    (oldest,) = second.versions
    assert (oldest.version, oldest.loaded, oldest.pinned, second.next_page_token) == (1, True, True, "")
    assert oldest == (await get(server, "adapters/a/versions/1")).adapter
    for fields, code, field in (
        ({"parent": "adapters/none"}, "NOT_FOUND", "parent"),
        ({"parent": "a"}, "INVALID_ARGUMENT", "parent"),
        ({"parent": "adapters/a/versions/1"}, "INVALID_ARGUMENT", "parent"),
        ({"parent": "adapters/a", "page_size": -1}, "INVALID_ARGUMENT", "page_size"),
        ({"parent": "adapters/b", "page_token": first.next_page_token}, "INVALID_ARGUMENT", "page_token"),
    ):
        error = await refused(server.adapters.ListVersions(pb.ListVersionsRequest(**fields)))
        assert (error.code, list(error.fields)) == (code, [field])


async def test_unloading_says_that_it_ended_a_pin(server):
    await create(server, "a")
    await server.adapters.PinAdapter(pb.PinAdapterRequest(name="adapters/a"))
    first = await server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="adapters/a"))
    assert (first.unpinned, first.adapter.pinned, first.adapter.loaded) == (True, False, False)
    assert not (await server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="adapters/a"))).unpinned


async def test_files_that_another_version_pins_are_not_unloaded(server, refused):
    await create(server, "a", files_of("same"))
    await create(server, "b", files_of("same"))
    await server.adapters.PinAdapter(pb.PinAdapterRequest(name="adapters/a"))
    error = await refused(server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="adapters/b")))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "ADAPTER_PINNED")
    pinned = (await get(server, "adapters/a")).adapter
    assert (pinned.pinned, pinned.loaded) == (True, True)
    await server.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="adapters/a"))
    unloaded = await server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="adapters/b"))
    assert not unloaded.adapter.loaded


async def test_the_engine_hears_of_pins_in_their_order(server, monkeypatch):
    """The first pin reads what is pinned, and is slow to come back with it; a second one must not be undone by it."""
    for name in ("a", "b"):
        await create(server, name)
    registry, delays = server.front._hub.registry, [0.3]
    pinned_versions = registry.pinned_versions

    def slow_at_first():
        found = pinned_versions()
        time.sleep(delays.pop() if delays else 0)
        return found

    monkeypatch.setattr(registry, "pinned_versions", slow_at_first)
    first = asyncio.create_task(pin(server, "a"))
    await until(lambda: not delays)
    second = await pin(server, "b")
    digests = sorted(answer.adapter.digest for answer in (await first, second))
    assert server.heard("Pin")[-1]["digests"] == digests


async def test_load_unload_delete(server, refused):
    await create(server, "a")
    name = "adapters/a"
    loaded = await server.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name))
    assert (loaded.adapter.loaded, loaded.load_report.already_loaded) == (True, False)
    again = await server.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name))
    assert again.load_report.already_loaded
    unloaded = await server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name=name))
    assert not unloaded.adapter.loaded
    await server.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name))
    answer = await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=name))
    assert answer.deleted_versions == 1
    await until(lambda: not server.front.engine.loaded)
    await until(lambda: not list((server.data / "artifacts").iterdir()))
    for call in (
        get(server, name),
        server.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name)),
        server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name=name)),
        server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=name)),
    ):
        assert (await refused(call)).code == "NOT_FOUND"


async def test_a_running_request_outlives_the_deletion(make_server):
    server = await make_server(options={"step_ms": 10})
    await create(server, "a")
    call = server.generation.Generate(
        generation_pb2.GenerateRequest(model="a", text="a", sampling=generation_pb2.SamplingParameters(max_tokens=20))
    )
    await call.read()
    await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="adapters/a"))
    assert len(list((server.data / "artifacts").iterdir())) == 1
    while (message := await call.read()) is not grpc.aio.EOF:
        last = message
    assert last.usage.completion_tokens == 20
    await until(lambda: not list((server.data / "artifacts").iterdir()))


async def test_the_same_files_under_two_names_stay_loaded_for_the_other(server):
    for name in ("a", "b"):
        await create(server, name, files_of("same"), load=True)
    await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="adapters/a"))
    await asyncio.sleep(0.05)
    assert (await get(server, "adapters/b")).adapter.loaded
    assert (await generate(server, "b"))[-1].model == "b"


async def test_adapters_survive_a_restart(make_server):
    first = await make_server()
    adapter = (await create(first, "kept")).adapter
    await first.stop()
    second = await make_server()
    assert (await get(second, "adapters/kept")).adapter == adapter
    assert (await generate(second, "kept"))[-1].model == "kept"


async def test_an_adapter_of_another_base_is_not_served(make_server, refused):
    first = await make_server()
    await create(first, "kept")
    await first.stop()
    second = await make_server(options={"fingerprint": "sha256:" + "1" * 64})
    error = await refused(second.generation.Generate(generation_pb2.GenerateRequest(model="kept", text="x")))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "BASE_MISMATCH")
