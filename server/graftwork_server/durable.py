"""Writing what survives a power cut, and what is said when the disk does not take it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
