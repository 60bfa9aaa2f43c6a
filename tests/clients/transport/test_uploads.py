"""Adapter folders and data sets on their way to the server, and what is refused before anything is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.clients.protos import adapter
from tests.clients.scripted_server import ScriptedServer, fail

import graftwork
from graftwork.requests import adapters as requests
from graftwork.transport import uploads
from graftwork.v1 import adapters_pb2 as a
from graftwork.v1 import tuning_pb2 as t

BIG = bytes(range(256)) * 5000  # 1.28 MB: three chunks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What PEFT writes, and what must stay at home."""
    path = tmp_path / "peft"
    (path / "checkpoint-1").mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(BIG)
    (path / "adapter_config.json").write_bytes(b"{}")
    (path / "README.md").write_bytes(b"")
    (path / "training_args.bin").write_bytes(b"pickle")
    (path / ".hidden.json").write_bytes(b"{}")
    (path / "checkpoint-1" / "a.safetensors").write_bytes(b"old")
    return path


def check_sent(messages: list[a.CreateAdapterRequest]) -> None:
    upload, chunks = messages[0].upload, messages[1:]
    assert [file.name for file in upload.files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    received: dict[str, bytes] = {file.name: b"" for file in upload.files}
    for message in chunks:
        assert 0 < len(message.chunk.data) <= 1024 * 1024
        received[message.chunk.name] += message.chunk.data
    for file in upload.files:
        assert file.size_bytes == len(received[file.name])
        assert file.sha256 == hashlib.sha256(received[file.name]).hexdigest()
    assert received["adapter_model.safetensors"] == BIG
    assert len(chunks) == 4


def test_folder_is_sent_whole(server: ScriptedServer, client: graftwork.Client, folder: Path) -> None:
    report = a.LoadReport(modules_bound=12, rank=8, device_bytes=99, load_ms=1.5)
    server.on("CreateAdapter", a.CreateAdapterResponse(adapter=adapter(loaded=True), load_report=report))
    progress: list[tuple[int, int]] = []
    created = client.adapters.create(
        "dates",
        folder,
        strategy="lora",
        new_version=True,
        load=True,
        on_progress=lambda sent, total: progress.append((sent, total)),
    )
    assert created.load_report == graftwork.LoadReport(12, 8, 99, 1.5, False)
    messages = server.requests("CreateAdapter")[0]
    check_sent(messages)
    upload = messages[0].upload
    assert (upload.adapter_id, upload.strategy, upload.new_version, upload.load) == ("dates", "lora", True, True)
    assert progress[-1] == (len(BIG) + 2, len(BIG) + 2)
    assert [sent for sent, _ in progress] == sorted(sent for sent, _ in progress)


async def test_folder_is_sent_whole_by_the_async_client(
    server: ScriptedServer, aclient: graftwork.AsyncClient, folder: Path
) -> None:
    server.on("CreateAdapter", fail(grpc.StatusCode.UNAVAILABLE), a.CreateAdapterResponse(adapter=adapter()))
    created = await aclient.adapters.create("dates", folder)
    assert created.load_report is None
    for messages in server.requests("CreateAdapter"):
        check_sent(messages)
    assert len(server.seen) == 2


def test_a_retry_sends_everything_again(server: ScriptedServer, client: graftwork.Client, folder: Path) -> None:
    server.on("CreateAdapter", fail(grpc.StatusCode.UNAVAILABLE), a.CreateAdapterResponse(adapter=adapter()))
    client.adapters.create("dates", folder)
    first, second = server.requests("CreateAdapter")
    assert first == second
    check_sent(second)


def test_an_early_refusal_is_the_servers(server: ScriptedServer, client: graftwork.Client, folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(BIG * 12)
    server.on("CreateAdapter", fail(grpc.StatusCode.ALREADY_EXISTS, reason="ADAPTER_EXISTS", early=True))
    with pytest.raises(graftwork.AlreadyExistsError) as caught:
        client.adapters.create("dates", folder)
    assert caught.value.reason == "ADAPTER_EXISTS"


def refused(client: graftwork.Client, folder: Path, match: str) -> None:
    with pytest.raises(graftwork.UploadError, match=match):
        client.adapters.create("dates", folder)


def test_folders_that_cannot_be_sent(server: ScriptedServer, client: graftwork.Client, tmp_path: Path) -> None:
    refused(client, tmp_path / "missing", "no such folder")
    file = tmp_path / "file.safetensors"
    file.write_bytes(b"x")
    refused(client, file, "not a folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".hidden.safetensors").write_bytes(b"x")
    refused(client, empty, "no files to send")
    (empty / "adapter_config.json").write_bytes(b"{}")
    (empty / "adapter_model.bin").write_bytes(b"pickle")
    refused(client, empty, r"adapter_model\.bin.*safe_serialization=True")
    assert server.seen == []


def test_links_may_not_leave_the_folder(server: ScriptedServer, client: graftwork.Client, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_bytes(b"{}")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "real.safetensors").write_bytes(b"x")
    (folder / "inside.safetensors").symlink_to("real.safetensors")
    server.on("CreateAdapter", a.CreateAdapterResponse(adapter=adapter()))
    client.adapters.create("dates", folder)
    names = [file.name for file in server.requests("CreateAdapter")[0][0].upload.files]
    assert names == ["inside.safetensors", "real.safetensors"]
    (folder / "adapter_config.json").symlink_to(secret)
    refused(client, folder, "link to a file outside")
    assert len(server.seen) == 1


def test_templates_in_their_folder_are_sent_too(
    server: ScriptedServer, client: graftwork.Client, tmp_path: Path
) -> None:
    """An artifact has no folders, so the name of theirs is part of their names. Nothing else in a folder is sent."""
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "checkpoint-1").mkdir()
    for name in ("a.safetensors", "additional_chat_templates/tool_use.jinja", "checkpoint-1/b.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    server.on("CreateAdapter", a.CreateAdapterResponse(adapter=adapter()))
    client.adapters.create("dates", tmp_path)
    names = [file.name for file in server.requests("CreateAdapter")[0][0].upload.files]
    assert names == ["a.safetensors", "additional_chat_templates.tool_use.jinja"]


def shrinking(path: Path) -> Iterator[bytes]:
    yield b"x"


async def test_a_file_that_changes_on_the_way_is_an_error(
    server: ScriptedServer,
    client: graftwork.Client,
    aclient: graftwork.AsyncClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(b'{"text": "a"}\n')
    server.on("UploadDataset", t.UploadDatasetResponse())
    weights = tmp_path / "a.safetensors"
    weights.write_bytes(b"xyz")
    call = requests.create_adapter(
        uploads.AdapterFiles(tmp_path), adapter_id="x", strategy=None, new_version=False, load=False, request_id=None
    )
    weights.write_bytes(b"xy")
    with pytest.raises(graftwork.UploadError, match="changed while it was being sent"):
        list(call.messages())
    monkeypatch.setattr(uploads, "_read", shrinking)
    with pytest.raises(graftwork.UploadError, match="changed while it was being sent"):
        client.datasets.upload(data)
    with pytest.raises(graftwork.UploadError, match="changed while it was being sent"):
        await aclient.datasets.upload(data)


def test_data_set_from_a_file(server: ScriptedServer, client: graftwork.Client, tmp_path: Path) -> None:
    data = tmp_path / "dates.jsonl"
    data.write_bytes(BIG)
    server.on(
        "UploadDataset",
        t.UploadDatasetResponse(dataset=t.Dataset(name="datasets/d", dataset_id="d", format=t.DATASET_FORMAT_CHAT)),
    )
    stored = client.datasets.upload(data)
    assert (stored.dataset_id, stored.format) == ("d", "chat")
    messages = server.requests("UploadDataset")[0]
    assert messages[0].upload == t.DatasetUpload(display_name="dates.jsonl", size_bytes=len(BIG))
    assert b"".join(message.data for message in messages[1:]) == BIG
    assert all(len(message.data) <= 1024 * 1024 for message in messages[1:])


async def test_data_set_from_rows_and_bytes(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    server.on("UploadDataset", t.UploadDatasetResponse())
    rows = ({"text": text} for text in ("a", "ü"))
    client.datasets.upload(rows, display_name="mine")
    await aclient.datasets.upload(b'{"text": "a"}')
    first, second = server.requests("UploadDataset")
    assert first[0].upload.display_name == "mine"
    assert first[1].data == '{"text": "a"}\n{"text": "ü"}\n'.encode()
    assert [message.data for message in second[1:]] == [b'{"text": "a"}']
    with pytest.raises(TypeError, match="row 1"):
        client.datasets.upload(["not a row"])  # type: ignore[list-item]
    with pytest.raises(graftwork.UploadError, match="cannot read"):
        client.datasets.upload("/nowhere/d.jsonl")


def test_bad_lines_of_an_upload_are_violations(server: ScriptedServer, client: graftwork.Client) -> None:
    lines = {"line 2": "not JSON", "line 7": "no completion"}
    server.on("UploadDataset", fail(grpc.StatusCode.INVALID_ARGUMENT, "2 bad lines", violations=lines))
    with pytest.raises(graftwork.InvalidArgumentError) as caught:
        client.datasets.upload(b"x")
    assert {v.field: v.description for v in caught.value.field_violations} == lines


async def test_validate(server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient) -> None:
    bad = t.LineError(line=2, reason="not JSON")
    response = t.ValidateDatasetResponse(format=t.DATASET_FORMAT_TEXT, row_count=1, errors=[bad], error_count=1)
    server.on("ValidateDataset", response)
    report = client.datasets.validate(b"ab", max_sequence_tokens=64)
    assert report.errors == (graftwork.LineError(2, "not JSON"),)
    assert not report.valid
    assert await aclient.datasets.validate(dataset="d1") == report
    sent, stored = server.requests("ValidateDataset")
    assert sent[0].check == t.DatasetCheck(max_sequence_tokens=64)
    assert sent[1].data == b"ab"
    assert [message.check.dataset for message in stored] == ["datasets/d1"]
    wrong: list[dict[str, Any]] = [{}, {"source": b"", "dataset": "d1"}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="either"):
            client.datasets.validate(**arguments)
