"""Opening a data directory: it is ours, it is ours alone, and only its user can read it.

A server removes what it does not know in its data directory, so it first makes sure whose the directory is. Ours has a
mark, graftwork.json. A directory without one is taken if it is empty, or if it holds the registry of a server that did
not write marks yet. Everything else is refused, and nothing in it is touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import pathname2url

from graftwork_server.durable import FULL, storage_error, sync
from graftwork_server.errors import FailedPrecondition
from graftwork_server.hub.files.reserve import RESERVE

MARK = "graftwork.json"
LOCK = "lock"
REGISTRY = "registry.db"
_FILES = (LOCK, REGISTRY, f"{REGISTRY}-wal", f"{REGISTRY}-shm", RESERVE)
FORMAT = 1
_KIND = "graftwork data directory"
_MARK_BYTES = 4096
_FOLDERS = ("staging", "artifacts", "datasets", "jobs")
_CACHE = "cache"
_OF_AN_EMPTY_DISK = {"lost+found"}
_TABLES = {"alembic_version", "adapters", "versions", "datasets", "jobs", "job_events", "requests"}
_ACCEPTED = (
    "name a directory that does not exist yet, is empty, or was used by a graftwork server before; nothing was changed"
)


def open_data_dir(root: Path) -> int:
    """Makes `root` usable and returns its lock, a file descriptor that holds the directory until it is closed.

    Creates what is missing, marks it, and takes permissions of other users away. Raises FailedPrecondition
    (DATA_DIR_UNUSABLE), (DATA_DIR_IN_USE) if another server has it, (SCHEMA_NEWER), (REGISTRY_DAMAGED) if its files are
    there without their registry, and ResourceExhausted (STORAGE_FULL).
    """
    with _data_dir_errors():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_marked(root):
            # Before anything else: a start that ends here, by a kill or a full disk, leaves a mark alone.
            _write_mark(root)
        _check_types(root)
        lock = _locked(root)
        try:
            _check_registry(root)
            _make_private(root)
        except BaseException:
            os.close(lock)
            raise
    return lock


def _is_marked(root: Path) -> bool:
    """Whether `root` has its mark. Raises FailedPrecondition (DATA_DIR_UNUSABLE) if it must not get one."""
    found = sorted(set(os.listdir(root)) - _OF_AN_EMPTY_DISK)
    if MARK in found:
        if _file_type(root / MARK) != stat.S_IFREG or (root / MARK).stat().st_size:
            _check_mark(root / MARK)
            return True
        found.remove(MARK)  # of a start that was ended while it wrote it
    if found and not _is_older_data_dir(root):
        names = ", ".join(repr(name) for name in found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise _unusable(f"it holds {names}, and no graftwork server has written to it", _ACCEPTED)
    return False


def _check_mark(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _unusable(f"its {MARK} is a symbolic link, not the mark of a data directory", _ACCEPTED) from None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _unusable(f"its {MARK} is no plain file, so not the mark of a data directory", _ACCEPTED)
        text = file.read(_MARK_BYTES)
    try:
        mark = json.loads(text)
        format_number = mark["format"] if mark["kind"] == _KIND else None
    except (ValueError, TypeError, KeyError, RecursionError):
        format_number = None
    if not isinstance(format_number, int):
        raise _unusable(f"its {MARK} is not the mark of a data directory", _ACCEPTED)
    if format_number > FORMAT:
        raise FailedPrecondition(
            f"the data directory was written by a newer graftwork (format {format_number}); use that one, or another "
            "data directory",
            reason="SCHEMA_NEWER",
        )


def _is_older_data_dir(root: Path) -> bool:
    """Whether a server has used `root` that wrote no marks: its lock and its registry are there."""
    if {_file_type(root / LOCK), _file_type(root / REGISTRY)} != {stat.S_IFREG}:
        return False
    with contextlib.suppress(sqlite3.Error):
        registry = sqlite3.connect(f"file:{pathname2url(str(root.absolute() / REGISTRY))}?mode=ro", uri=True)
        with contextlib.closing(registry):
            tables = {name for (name,) in registry.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return tables >= _TABLES
    return False


def _check_types(root: Path) -> None:
    """Raises FailedPrecondition where one of our folders or files leads elsewhere: what it leads to is not ours."""
    kinds = dict.fromkeys((*_FOLDERS, _CACHE), (stat.S_IFDIR, "no folder"))
    kinds |= dict.fromkeys(_FILES, (stat.S_IFREG, "no plain file"))
    for name, (wanted, otherwise) in kinds.items():
        file_type = _file_type(root / name)
        if file_type not in (0, wanted):
            what = "a symbolic link" if file_type == stat.S_IFLNK else otherwise
            accepted = (
                f"remove {name!r}, or put the whole data directory where its files are to be; nothing was changed"
            )
            raise _unusable(f"its {name!r} is {what}", accepted)


def _file_type(path: Path) -> int:
    """stat.S_IFREG, S_IFDIR, S_IFLNK, ... of `path` itself, not of what it links to; 0 if there is nothing."""
    try:
        return stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return 0


def _locked(root: Path) -> int:
    # Not inherited by child processes, so the lock ends with this process whatever outlives it.
    lock = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise FailedPrecondition(
            "another graftwork server uses this data directory; stop it or choose another with --data-dir",
            reason="DATA_DIR_IN_USE",
        ) from error
    return lock


def _write_mark(root: Path) -> None:
    mark = os.open(root / MARK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.write(mark, json.dumps({"kind": _KIND, "format": FORMAT}).encode() + b"\n")
        os.fsync(mark)
    finally:
        os.close(mark)
    sync(root)


def _check_registry(root: Path) -> None:
    """Without its registry, all files would be garbage. Raises FailedPrecondition where files are there without it."""
    registry = root / REGISTRY
    if registry.exists() and registry.stat().st_size:
        return
    orphaned = [name for name in ("artifacts", "datasets") if (root / name).is_dir() and os.listdir(root / name)]
    if orphaned:
        raise FailedPrecondition(
            f"the data directory has files in {' and '.join(orphaned)}, but its {REGISTRY} is missing or empty; "
            "restore it from a backup, or name another directory; nothing was changed",
            reason="REGISTRY_DAMAGED",
        )


def _make_private(root: Path) -> None:
    """Makes the folders and the registry for this user alone, also those of a server that was less careful."""
    for name in _FOLDERS:
        (root / name).mkdir(mode=0o700, exist_ok=True)
    # SQLite would make it readable for all, and what it puts beside it like it.
    os.close(os.open(root / REGISTRY, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    _restrict([root, *(root / name for name in (*_FOLDERS, _CACHE))], 0o700)
    files = [root / name for name in (*_FILES, MARK)]
    _restrict([*files, *(root / "datasets").iterdir()], 0o600)


def _restrict(paths: Sequence[Path], mode: int) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            is_ours = stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
            if is_ours and stat.S_IMODE(status.st_mode) & ~mode:
                path.chmod(stat.S_IMODE(status.st_mode) & mode)


@contextmanager
def _data_dir_errors() -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise _unusable("a file stands in its place or above it") from error
    except OSError as error:
        if error.errno in FULL:
            raise storage_error(error, "opening the data directory") from error
        raise _unusable(error.strerror or "input/output error") from error


def _unusable(why: str, accepted: str = "name a directory that this user can make or write to") -> FailedPrecondition:
    return FailedPrecondition(f"the data directory cannot be used: {why}; {accepted}", reason="DATA_DIR_UNUSABLE")
