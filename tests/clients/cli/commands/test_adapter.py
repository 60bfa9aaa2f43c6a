"""graftwork adapter: what each command sends and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
from tests.clients.cli.running import objects
from tests.clients.protos import adapter
from tests.clients.scripted_server import ScriptedServer, fail

from graftwork.v1 import adapters_pb2 as a


def test_adapter_commands(server: ScriptedServer, run: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    report = a.LoadReport(modules_bound=12, rank=8, device_bytes=2000, load_ms=3.25)
    server.on("CreateAdapter", a.CreateAdapterResponse(adapter=adapter(loaded=True), load_report=report))
    server.on("ListAdapters", a.ListAdaptersResponse(adapters=[adapter(), adapter("much-longer")]))
    newer = adapter(version=2, loaded=True, pinned=True)
    server.on("ListVersions", a.ListVersionsResponse(versions=[newer, adapter()]))
    server.on("LoadAdapter", a.LoadAdapterResponse(adapter=adapter(), load_report=report))
    unpinned = a.UnloadAdapterResponse(adapter=adapter(), unpinned=True)
    server.on("UnloadAdapter", a.UnloadAdapterResponse(adapter=adapter()), unpinned)
    server.on("PinAdapter", a.PinAdapterResponse(adapter=adapter(pinned=True), load_report=report))
    server.on("UnpinAdapter", a.UnpinAdapterResponse(adapter=adapter()))
    server.on("DeleteAdapter", a.DeleteAdapterResponse(deleted_versions=2))
    server.on("GetAdapter", fail(grpc.StatusCode.NOT_FOUND), a.GetAdapterResponse(adapter=adapter()))
    created = run("adapter", "create", "dates", str(tmp_path), "--strategy", "lora", "--new-version", "--load").stdout
    assert created.startswith("published dates@1\n")
    assert "12 modules, rank 8, 2.0 kB, in 3.2 ms" in created
    upload = server.requests("CreateAdapter")[0][0].upload
    assert (upload.strategy, upload.new_version, upload.load) == ("lora", True, True)
    header, first, second = run("adapter", "list").stdout.splitlines()
    assert header.split() == ["ADAPTER", "VERSION", "STRATEGY", "LOADED", "PINNED", "RANK", "SIZE", "CREATED"]
    assert first.split() == ["dates", "1", "lora", "no", "no", "8", "1.5", "MB", "-"]
    assert header.index("VERSION") == second.index("1")
    ids = [item["adapter_id"] for item in objects(run("adapter", "list", "--json"))[0]]
    assert ids == ["dates", "much-longer"]
    header, newest, oldest = run("adapter", "versions", "dates").stdout.splitlines()
    assert header.split()[:4] == ["VERSION", "STRATEGY", "LOADED", "PINNED"]
    assert newest.split()[:4] == ["dates@2", "lora", "yes", "yes"]
    assert oldest.startswith("dates@1")
    assert server.requests("ListVersions")[0].parent == "adapters/dates"
    assert [item["version"] for item in objects(run("adapter", "versions", "dates", "--json"))[0]] == [2, 1]
    assert "dates@1" in run("adapter", "show", "dates").stdout
    assert run("adapter", "load", "dates@1").stdout.startswith("loaded dates@1\n")
    assert objects(run("adapter", "load", "dates", "--json"))[0]["load_report"]["modules_bound"] == 12
    assert run("adapter", "unload", "dates").stdout == "unloaded dates@1\n"
    assert run("adapter", "unload", "dates").stdout == "unloaded dates@1; it was pinned, and is no more\n"
    assert run("adapter", "pin", "dates").stdout.startswith("pinned dates@1\n")
    assert objects(run("adapter", "pin", "dates", "--json"))[0]["pinned"] is True
    assert run("adapter", "unpin", "dates").stdout == "unpinned dates@1\n"
    assert run("adapter", "delete", "dates").stdout == "deleted dates (2 versions)\n"
    assert objects(run("adapter", "delete", "dates", "--json")) == [{"adapter_id": "dates", "deleted_versions": 2}]


def test_the_same_files_again_are_not_called_published(server: ScriptedServer, run: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter(version=2)))
    server.on("CreateAdapter", *(a.CreateAdapterResponse(adapter=adapter(version=version)) for version in (2, 3)))
    again = run("adapter", "create", "dates", str(tmp_path), "--new-version").stdout
    assert again.startswith("nothing new: dates@2 has the same files\n")
    assert run("adapter", "create", "dates", str(tmp_path), "--new-version").stdout.startswith("published dates@3\n")


def test_one_version_is_deleted(server: ScriptedServer, run: Any) -> None:
    server.on("DeleteVersion", a.DeleteVersionResponse(newest_version=1))
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter(version=1)))
    assert run("adapter", "delete", "dates@2").stdout == "deleted dates@2; dates means version 1 now\n"
    present, gone = a.GetAdapterResponse(adapter=adapter()), fail(grpc.StatusCode.NOT_FOUND)
    server.on("GetAdapter", present, gone, present)
    assert run("adapter", "delete", "dates@1").stdout == "deleted dates@1; it was the last version of dates\n"
    assert objects(run("adapter", "delete", "dates@1", "--json")) == [{"adapter_id": "dates", "deleted_versions": 1}]
