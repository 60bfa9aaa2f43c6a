"""client.adapters: what is sent, and what comes back."""

from __future__ import annotations

import pytest
from tests.clients.protos import adapter
from tests.clients.scripted_server import ScriptedServer

import graftwork
from graftwork.v1 import adapters_pb2 as a


async def test_adapter_calls(server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient) -> None:
    report = a.LoadReport(modules_bound=3, already_loaded=True)
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter(version=2)))
    server.on("LoadAdapter", a.LoadAdapterResponse(adapter=adapter(loaded=True), load_report=report))
    server.on("UnloadAdapter", a.UnloadAdapterResponse(adapter=adapter()))
    server.on("PinAdapter", a.PinAdapterResponse(adapter=adapter(pinned=True), load_report=report))
    server.on("UnpinAdapter", a.UnpinAdapterResponse(adapter=adapter()))
    server.on("DeleteAdapter", a.DeleteAdapterResponse(deleted_versions=2))
    assert (client.adapters.pin("dates").pinned, (await aclient.adapters.pin("dates")).pinned) == (True, True)
    assert client.adapters.pin("dates").load_report == graftwork.LoadReport(3, 0, 0, 0.0, True)
    assert not client.adapters.unpin("dates@1").pinned
    assert not (await aclient.adapters.unpin("dates")).pinned
    assert {seen.request.name for seen in server.seen} == {"adapters/dates", "adapters/dates/versions/1"}
    server.seen.clear()
    found = client.adapters.get("dates@2")
    assert client.adapters.load(found).load_report == graftwork.LoadReport(3, 0, 0, 0.0, True)
    assert (await aclient.adapters.load("dates")).loaded
    assert client.adapters.unload("adapters/dates/versions/1").load_report is None
    assert not (await aclient.adapters.unload("dates")).loaded
    assert client.adapters.delete(found) == 2
    assert await aclient.adapters.delete("dates") == 2
    assert [seen.request.name for seen in server.seen] == [
        "adapters/dates/versions/2",
        "adapters/dates/versions/2",
        "adapters/dates",
        "adapters/dates/versions/1",
        "adapters/dates",
        "adapters/dates",
        "adapters/dates",
    ]
    for wrong in ("dates@x", "dates@", "dates@-1"):
        with pytest.raises(ValueError, match="ID@VERSION"):
            client.adapters.get(wrong)
    server.seen.clear()
    server.on("DeleteVersion", a.DeleteVersionResponse(newest_version=1))
    assert client.adapters.delete("dates@2") == 1
    assert await aclient.adapters.delete("adapters/dates/versions/2") == 1
    assert {(seen.method, seen.request.name) for seen in server.seen} == {
        ("DeleteVersion", "adapters/dates/versions/2")
    }
    server.seen.clear()
    client.adapters.get("dates@latest")
    assert [seen.request.name for seen in server.seen] == ["adapters/dates"]
