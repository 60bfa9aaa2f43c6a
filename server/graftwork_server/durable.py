"""Writing what survives a power cut, whole or not at all, and what is said when the disk does not take it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftwork_server.errors import GraftworkServerError, ResourceExhausted, Unavailable

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that go away once there is room."""


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Errors of the file system as ours, without paths: STORAGE_FULL or STORAGE_FAILED, see storage_error."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, doing) from error


def storage_error(error: OSError, doing: str) -> GraftworkServerError:
    """`error` as ResourceExhausted (STORAGE_FULL) or Unavailable (STORAGE_FAILED); `doing` completes "while ..."."""
    if error.errno in FULL:
        return ResourceExhausted(
            f"the server's disk is full (while {doing}); nothing was published", reason="STORAGE_FULL"
        )
    text = os.strerror(error.errno) if error.errno else "input/output error"
    return Unavailable(f"the server's disk failed while {doing}: {text}", reason="STORAGE_FAILED")


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """A JSON file, synced. Raises ValueError for NaN and infinities, which are not JSON."""
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes `folder` by calling fill(temporary folder beside it) and renaming that. What stood there is replaced.

    `fill` syncs the files that it writes.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        sync(temporary)
    except BaseException:
        remove(temporary)  # on a full disk, others need its place
        raise
    remove(folder)
    move(temporary, folder)


def move(path: Path, target: Path) -> None:
    """Renames what was synced before, and makes its new place survive a power cut. Both are on one file system."""
    path.rename(target)
    sync(target.parent)


def remove(folder: Path) -> None:
    """Removes a folder if it is there; of a link, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, lower-case hexadecimal: it tells what a disk did to the file later."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
