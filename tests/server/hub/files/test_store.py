"""store.py and uploads.py on real directories: whole or not there, whatever a client sends and whenever it ends."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftwork_server.durable import sha256_of
from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument
from graftwork_server.hub.files import manifest as manifest_module
from graftwork_server.hub.files import store as store_module
from graftwork_server.hub.files.manifest import check_file_name, digest_of, write_manifest
from graftwork_server.hub.files.store import Store
from graftwork_server.hub.files.uploads import ArtifactUpload, DatasetUpload, UploadFile
from graftwork_server.hub.hub import Hub

SAFETENSORS = struct.pack("<Q", 2) + b"{}"
HOSTILE_NAMES = [
    "", ".", "..", "../x.json", "/etc/x.json", "a/b.json", "a\\b.json", "x.json\0", "x.json\n", ".hidden.json",
    "-rf.json", "pytorch_model.bin", "x.pt", "x.pkl", "x.pickle", "x.py", "x.so", "x.safetensors.bin", "x.JSON.exe",
    "ü.json", "x\u202e.json", "a" * 300 + ".json", "con:x.json", "~x.json", "$x.json", "x .json", ".json", "x.tar",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_file_names_are_refused(hub: Hub, name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ArtifactUpload(hub.store, [UploadFile(name, 1)], 100)
    assert caught.value.reason == "FILE_NAME_INVALID"
    assert caught.value.violations[0].field == "upload.files[0].name"
    assert list(hub.store.staging.iterdir()) == []


def upload(hub: Hub, files: dict[str, bytes]) -> ArtifactUpload:
    announced = [UploadFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
    result = ArtifactUpload(hub.store, announced, 1 << 20)
    for name, data in files.items():
        for start in range(0, len(data), 3):
            result.write(name, data[start : start + 3])
    return result


def test_an_upload_becomes_an_artifact_once(hub: Hub) -> None:
    digests = set()
    for _ in range(2):
        with upload(hub, {"adapter_config.json": b"{}", "empty.txt": b"", "a.safetensors": SAFETENSORS}) as whole:
            folder = whole.finish()
            assert folder.stat().st_mode & 0o777 == 0o700
            digest = write_manifest(
                folder, strategy="lora", base_fingerprint="b", parameter_count=1, rank=2, created_by="t"
            )
            stored = hub.store.adopt(folder, digest)
        digests.add(stored.digest)
        assert not folder.exists()
        assert sorted(os.listdir(stored.path)) == ["a.safetensors", "adapter_config.json", "empty.txt", "manifest.json"]
        assert stored.size_bytes == sum(entry.stat().st_size for entry in os.scandir(stored.path))
        assert digest_of(Path(stored.path)) == stored.digest
        manifest = json.loads((Path(stored.path) / "manifest.json").read_text())
        assert manifest["files"]["adapter_config.json"]["sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert len(digests) == 1
    assert len(list(hub.store.artifacts.iterdir())) == 1


def test_the_digest_is_the_manifests_and_no_file_is_hashed_twice(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an upload hashed as it came is not read again; of other files each is read once."""
    files = {"adapter_config.json": b"{}", "empty.txt": b"", "a.safetensors": SAFETENSORS}
    fields: dict[str, Any] = {"strategy": "lora", "base_fingerprint": "b", "parameter_count": 1, "rank": 2}
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    with upload(hub, {**files, "manifest.json": b"{}"}) as whole:
        folder = whole.finish()
        with monkeypatch.context() as patch:
            patch.setattr(manifest_module, "sha256_of", counted)
            known = write_manifest(folder, created_by="t", sha256=whole.sha256, **fields)
            assert hashed == []
            read = write_manifest(folder, created_by="t", **fields)
            assert sorted(hashed) == sorted(files)
        assert known == read == digest_of(folder)


def test_the_digest_covers_names_and_bytes(tmp_path: Path) -> None:
    digests = set()
    for index, files in enumerate([{"a.json": "1"}, {"b.json": "1"}, {"a.json": "2"}, {"a.json": "1", "b.json": ""}]):
        folder = tmp_path / str(index)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        digests.add(digest_of(folder))
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("files", "pieces", "reason"),
    [
        ([("a.json", 4)], [("a.json", b"123")], "UPLOAD_TRUNCATED"),
        ([("a.json", 4), ("b.json", 1)], [("a.json", b"1234")], "UPLOAD_TRUNCATED"),
        ([("a.json", 4)], [("a.json", b"12345")], "UPLOAD_SIZE_MISMATCH"),
        ([("a.json", 4)], [("a.json", b"1234"), ("a.json", b"5")], "UPLOAD_OUT_OF_ORDER"),
        ([("a.json", 4)], [("b.json", b"1")], "UPLOAD_OUT_OF_ORDER"),
        ([("a.json", 4, "0" * 64)], [("a.json", b"1234")], "UPLOAD_CORRUPT"),
        ([("a.json", 4, "é")], [("a.json", b"1234")], "UPLOAD_CORRUPT"),
        ([("a.json", 4), ("A.json", 4)], [], "FILE_NAME_TWICE"),
        ([("a.json", -1)], [], "SIZE_INVALID"),
        ([("a.json", 1 << 62)], [], "UPLOAD_TOO_LARGE"),
        ([], [], "FILE_COUNT_INVALID"),
        ([("a.safetensors", 4)], [("a.safetensors", b"1234")], "SAFETENSORS_INVALID"),
    ],
)
def test_uploads_that_are_not_as_announced(hub: Hub, files: list[Any], pieces: list[Any], reason: str) -> None:
    announced = [UploadFile(*file) for file in files]
    with pytest.raises(InvalidArgument) as caught, ArtifactUpload(hub.store, announced, 1000) as attempt:  # noqa: PT012
        for piece in pieces:
            attempt.write(*piece)
        attempt.finish()
    assert caught.value.reason == reason
    assert list(hub.store.staging.iterdir()) == []


def test_a_thousand_empty_files(hub: Hub) -> None:
    with ArtifactUpload(hub.store, [UploadFile(f"{n}.txt", 0) for n in range(1000)], 1) as whole:
        assert len(os.listdir(whole.finish())) == 1000


@pytest.mark.parametrize("kind", ["folder", "symlink", "pickle", "dotfile"])
def test_adopt_refuses_what_no_artifact_has(hub: Hub, kind: str) -> None:
    folder = hub.store.new_staging()
    (folder / "a.json").write_text("{}")
    if kind == "folder":
        (folder / "sub.json").mkdir()
    elif kind == "symlink":
        (folder / "b.json").symlink_to("/etc/passwd")
    else:
        (folder / {"pickle": "optimizer.pt", "dotfile": ".x.json"}[kind]).write_text("x")
    with pytest.raises(InvalidArgument):
        hub.store.adopt(folder, "sha256:" + "0" * 64)
    assert list(hub.store.artifacts.iterdir()) == []


def test_datasets_are_stored_by_content(hub: Hub) -> None:
    ids = set()
    for pieces in ([b'{"text": "a"}\n'], [b'{"te', b'xt": "a"}', b"\n"]):
        with DatasetUpload(hub.store, 100, size_bytes=14) as whole:
            for piece in pieces:
                whole.write(piece)
            ids.add(whole.finish())
            assert whole.store().read_bytes() == b'{"text": "a"}\n'
    assert [f"{id}.jsonl" for id in ids] == os.listdir(hub.store.datasets)
    for size, data, reason in [
        (15, b"x", "UPLOAD_TRUNCATED"),
        (1, b"xx", "UPLOAD_SIZE_MISMATCH"),
        (0, b"x" * 101, "UPLOAD_TOO_LARGE"),
    ]:
        with pytest.raises(InvalidArgument) as caught, DatasetUpload(hub.store, 100, size) as bad:  # noqa: PT012
            bad.write(data)
            bad.finish()
        assert caught.value.reason == reason
    assert len(os.listdir(hub.store.datasets)) == 1
    assert os.listdir(hub.store.staging) == []


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(errno.ENOSPC, "RESOURCE_EXHAUSTED", "STORAGE_FULL"), (errno.EIO, "UNAVAILABLE", "STORAGE_FAILED")],
)
def test_a_failing_disk_leaves_nothing_half_visible(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, number: int, code: str, reason: str
) -> None:
    folder = hub.store.new_staging()
    (folder / "a.json").write_text("{}")

    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(store_module, "sync", fail)
    with pytest.raises(GraftworkServerError) as caught:
        hub.store.adopt(folder, digest_of(folder))
    assert (caught.value.code, caught.value.reason) == (code, reason)
    assert str(folder) not in caught.value.message
    assert list(hub.store.artifacts.iterdir()) == []
    monkeypatch.undo()
    assert hub.store.has_artifact(hub.store.adopt(folder, digest_of(folder)).digest)


def test_garbage_goes_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Store(tmp_path)
    kept_job, lost_job, kept_data, lost_data = "job-" + "1" * 16, "job-" + "2" * 16, "ds-" + "3" * 32, "ds-" + "4" * 32
    for folder in (
        first.new_staging(),
        first.artifacts / ("a" * 64),
        first.artifacts / ("b" * 64),
        first.jobs / lost_job,
        first.jobs / kept_job,
    ):
        folder.mkdir(exist_ok=True)
        (folder / "file.json").write_text("{}")
    for id in (kept_data, lost_data):
        first.dataset_path(id).write_text("")
    caplog.set_level("INFO")
    removed = first.collect({"sha256:" + "a" * 64}, {kept_data}, {kept_job})
    assert len(removed) == 4
    for name in removed:
        assert f"removing {name}" in caplog.text
    assert os.listdir(first.artifacts) == ["a" * 64]
    assert os.listdir(first.datasets) == [f"{kept_data}.jsonl"]
    assert os.listdir(first.jobs) == [kept_job]
    assert os.listdir(first.staging) == []
    first.close()


def test_a_second_server_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    code = (
        "import sys, time; from graftwork_server.hub.files.store import Store\n"
        "store = Store(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(FailedPrecondition) as caught:
            Store(tmp_path)
        assert caught.value.reason == "DATA_DIR_IN_USE"
        other.send_signal(signal.SIGKILL)
        other.wait()
    Store(tmp_path).close()


def test_child_processes_do_not_hold_the_lock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    command = [sys.executable, "-c", "print(1, flush=True); input()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, close_fds=False) as child:
        assert child.stdout is not None
        child.stdout.readline()
        store.close()
        Store(tmp_path).close()
        child.communicate(b"\n")


def test_names_that_are_taken() -> None:
    for name in (
        "adapter_model.safetensors",
        "config.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "README.md",
    ):
        check_file_name(name)
