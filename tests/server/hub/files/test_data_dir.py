"""Whose a data directory is: what a server takes, what it refuses untouched, and who can read it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork_server.errors import FailedPrecondition, GraftworkServerError
from graftwork_server.hub.files.data_dir import MARK
from graftwork_server.hub.hub import Hub
from graftwork_server.types import DatasetFormat

FOLDERS = ("staging", "artifacts", "datasets", "jobs", "cache")
MANY = "0123456789abcdef"
NAMES_LIKE_OURS = {
    "staging": [MANY, f"{MANY}.jsonl", f"deleted-{MANY}"],
    "artifacts": [MANY * 4],
    "datasets": [f"ds-{MANY * 2}.jsonl"],
    "jobs": [f"job-{MANY}"],
    "cache": ["tokenizers"],
}


def picture(root: Path) -> dict[str, tuple[int, str]]:
    """Every path below `root` with its mode, and its content or target."""
    seen = {}
    for path in sorted([root, *root.rglob("*")]):
        content = os.readlink(path) if path.is_symlink() else ""
        content = content or (path.read_text(errors="replace") if path.is_file() else "")
        seen[str(path.relative_to(root))] = (path.lstat().st_mode, content)
    return seen


def refused(root: Path, reason: str = "DATA_DIR_UNUSABLE") -> str:
    """What is said about `root`, which must stay as it is."""
    before = picture(root)
    with pytest.raises(FailedPrecondition) as caught:
        Hub(root)
    assert caught.value.reason == reason
    assert picture(root) == before
    return caught.value.message


def fill_with_canaries(root: Path) -> None:
    for folder, names in NAMES_LIKE_OURS.items():
        for name in [*names, "thesis.txt"]:
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("years of work")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_with_others_files_is_refused_and_untouched(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / NAMES_LIKE_OURS[folder][0]).write_text("years of work")
    message = refused(tmp_path)
    assert repr(folder) in message
    assert "empty" in message


def test_empty_folders_of_our_names_are_somebody_elses_too(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    refused(tmp_path)


@pytest.mark.parametrize("name", ["lock", "registry.db", ".git", MARK])
def test_a_folder_with_any_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    refused(tmp_path)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", '{"format": 1}', '{"kind": "x", "format": 1}', "\xff\x00", " ", "[" * 4096]
)
def test_a_file_called_like_the_mark_is_no_mark(tmp_path: Path, text: str) -> None:
    fill_with_canaries(tmp_path)
    (tmp_path / MARK).write_text(text)
    refused(tmp_path)


def test_a_mark_that_is_a_link_or_a_folder_is_no_mark(tmp_path: Path) -> None:
    Hub(tmp_path / "ours").close()
    for name in ("linked", "folder"):
        fill_with_canaries(tmp_path / name)
    (tmp_path / "linked" / MARK).symlink_to(tmp_path / "ours" / MARK)
    (tmp_path / "folder" / MARK).mkdir()
    assert "symbolic link" in refused(tmp_path / "linked")
    refused(tmp_path / "folder")


def test_a_link_to_a_folder_with_others_files_is_refused(tmp_path: Path) -> None:
    fill_with_canaries(tmp_path / "theirs")
    before = picture(tmp_path / "theirs")
    (tmp_path / "data").symlink_to(tmp_path / "theirs")
    refused(tmp_path / "data")
    assert picture(tmp_path / "theirs") == before


@pytest.mark.parametrize("folder", FOLDERS)
def test_one_of_our_folders_that_is_a_link_is_refused(tmp_path: Path, folder: str) -> None:
    Hub(tmp_path / "data").close()
    fill_with_canaries(tmp_path / "theirs")
    before = picture(tmp_path / "theirs")
    shutil.rmtree(tmp_path / "data" / folder, ignore_errors=True)
    (tmp_path / "data" / folder).symlink_to(tmp_path / "theirs" / folder)
    message = refused(tmp_path / "data")
    assert repr(folder) in message
    assert "symbolic link" in message
    assert picture(tmp_path / "theirs") == before


@pytest.mark.parametrize("name", ["registry.db", "registry.db-wal", "registry.db-shm", "lock", "reserve"])
def test_one_of_our_files_that_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    Hub(tmp_path / "data").close()
    (tmp_path / "theirs").write_text("years of work")
    (tmp_path / "data" / name).unlink(missing_ok=True)
    (tmp_path / "data" / name).symlink_to(tmp_path / "theirs")
    message = refused(tmp_path / "data")
    assert repr(name) in message
    assert "symbolic link" in message
    assert (tmp_path / "theirs").read_text() == "years of work"


@pytest.mark.parametrize("target", ["empty", "missing", "used"])
def test_a_link_to_a_directory_of_ours_is_followed_once(tmp_path: Path, target: str) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "data"
    if target == "empty":
        real.mkdir(parents=True)
    if target == "used":
        Hub(real).close()
    link.symlink_to(real)
    for _ in range(2):
        Hub(link).close()
    assert (real / MARK).is_file()
    assert link.is_symlink()
    with contextlib.closing(Hub(real)):
        assert refused(link, "DATA_DIR_IN_USE")


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(tmp_path / "data")
    refused(tmp_path / "data")


def test_links_in_our_folders_are_not_followed(tmp_path: Path) -> None:
    data, theirs = tmp_path / "data", tmp_path / "theirs"
    Hub(data).close()
    fill_with_canaries(theirs)
    before = picture(theirs)
    for folder in FOLDERS[:-1]:
        (data / folder / NAMES_LIKE_OURS[folder][-1]).symlink_to(theirs)
        inside = data / folder / "deleted-aaaaaaaaaaaaaaaa"
        inside.mkdir()
        (inside / "link").symlink_to(theirs)
    Hub(data).close()
    assert picture(theirs) == before
    assert os.listdir(data / "staging") == [f"deleted-{MANY}"]  # the folder went, with the link in it and nothing else


def test_a_hard_link_is_removed_and_what_it_names_stays(tmp_path: Path) -> None:
    Hub(tmp_path / "data").close()
    theirs = tmp_path / "thesis.txt"
    theirs.write_text("years of work")
    theirs.chmod(0o644)
    os.link(theirs, tmp_path / "data" / "datasets" / f"ds-{MANY * 2}.jsonl")
    Hub(tmp_path / "data").close()
    assert os.listdir(tmp_path / "data" / "datasets") == []
    assert (theirs.read_text(), stat.S_IMODE(theirs.stat().st_mode)) == ("years of work", 0o644)


def test_files_that_are_none_of_ours_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Hub(tmp_path).close()
    for folder in FOLDERS[:-1]:
        (tmp_path / folder / "thesis.txt").write_text("years of work")
        (tmp_path / folder / "notes").mkdir()
    caplog.set_level("WARNING")
    Hub(tmp_path).close()
    for folder in FOLDERS[:-1]:
        assert (tmp_path / folder / "thesis.txt").read_text() == "years of work"
        assert (tmp_path / folder / "notes").is_dir()
        assert f"{folder}/thesis.txt" in caplog.text


@pytest.mark.parametrize("prepare", [lambda path: None, os.mkdir, lambda path: os.makedirs(path / "lost+found")])
def test_a_new_or_empty_folder_is_taken_and_marked(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    data = tmp_path / "data"
    prepare(data)
    for _ in range(2):
        Hub(data).close()
    assert json.loads((data / MARK).read_text())["format"] == 1


def test_a_start_that_ended_in_the_middle_of_its_mark_is_taken_up(tmp_path: Path) -> None:
    (tmp_path / MARK).touch()
    Hub(tmp_path).close()
    assert json.loads((tmp_path / MARK).read_text())["format"] == 1


def test_a_newer_mark_is_refused(tmp_path: Path) -> None:
    Hub(tmp_path).close()
    mark = json.loads((tmp_path / MARK).read_text())
    (tmp_path / MARK).write_text(json.dumps(mark | {"format": 2}))
    assert "newer" in refused(tmp_path, "SCHEMA_NEWER")


def test_a_directory_of_an_older_server_is_recognised_and_tightened(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    hub.store.dataset_path(f"ds-{MANY * 2}").write_text("")
    hub.datasets.add(f"ds-{MANY * 2}", display_name="", format=DatasetFormat.TEXT, row_count=1, size_bytes=0)
    hub.close()
    (tmp_path / MARK).unlink()
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    older = Hub(tmp_path)
    assert older.datasets.ids() == {f"ds-{MANY * 2}"}
    for path in [tmp_path, *tmp_path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "registry.db-wal").exists()
    older.close()
    assert json.loads((tmp_path / MARK).read_text())["format"] == 1


def test_a_registry_of_another_program_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("CREATE TABLE adapters (id)")
    connection.close()
    fill_with_canaries(tmp_path)
    refused(tmp_path)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_files_without_their_registry_are_kept(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    Hub(tmp_path).close()
    (tmp_path / "artifacts" / (MANY * 4)).mkdir()
    damage(tmp_path / "registry.db")
    with pytest.raises(GraftworkServerError) as caught:
        Hub(tmp_path)
    assert caught.value.reason == "REGISTRY_DAMAGED"
    assert (tmp_path / "artifacts" / (MANY * 4)).is_dir()


@pytest.mark.parametrize("attempt", range(10))
def test_of_many_starts_at_once_on_a_new_directory_one_wins(tmp_path: Path, attempt: int) -> None:
    hubs: list[Hub] = []
    refusals: list[str] = []
    barrier = threading.Barrier(4)

    def start() -> None:
        barrier.wait()
        try:
            hubs.append(Hub(tmp_path))
        except FailedPrecondition as error:
            refusals.append(error.reason)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hub in hubs:
        hub.close()
    assert (len(hubs), refusals) == (1, ["DATA_DIR_IN_USE"] * 3)
