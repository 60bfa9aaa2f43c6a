"""The files of adapters, data sets and jobs, under one data directory that one server uses at a time.

    lock                  held (flock) while a server runs
    registry.db           see database.py
    staging/              uploads that are not whole yet, and folders on their way to deletion
    artifacts/{sha256}/   the files of a version; the name is made from their content
    datasets/{id}.jsonl   a data set; the id is made from its content
    jobs/{id}/            checkpoints of a running job, and its finished files until they are published

What stands under artifacts/ and datasets/ came there by one rename of files that were durable before, so it is whole
or not there. What no row of the registry names is garbage, removed at the next start.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from graftwork_server import failpoints
from graftwork_server.errors import (
    FailedPrecondition,
    GraftworkServerError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)

MANIFEST = "manifest.json"
_MOST_END_TOKENS = 64
MANIFEST_FORMAT = 1
FILE_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
MAX_FILES = 1000
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PIECE = 1 << 20


class StoredArtifact(msgspec.Struct, frozen=True):
    """An artifact in its final place. `digest` is "sha256:" and 64 hexadecimal digits."""

    digest: str
    path: str
    size_bytes: int


def check_file_name(name: str, field: str = "files.name") -> None:
    """Raises InvalidArgument (FILE_NAME_INVALID) unless an artifact may have a file of this name."""
    if not _FILE_NAME.fullmatch(name) or not name.endswith(FILE_SUFFIXES):
        raise InvalidArgument(
            f"{name[:100]!r} is no name for an adapter's file: at most 200 letters, digits, '.', '_' and '-', not "
            f"beginning with '.' or '-', without folders, ending in one of {', '.join(FILE_SUFFIXES)}",
            reason="FILE_NAME_INVALID",
            field=field,
        )


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Errors of the file system as ours, without paths: STORAGE_FULL or STORAGE_FAILED, see storage_error."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, doing) from error


def storage_error(error: OSError, doing: str) -> GraftworkServerError:
    """`error` as ResourceExhausted (STORAGE_FULL) or Unavailable (STORAGE_FAILED); `doing` completes "while ..."."""
    if error.errno in _FULL:
        return ResourceExhausted(
            f"the server's disk is full (while {doing}); nothing was published", reason="STORAGE_FULL"
        )
    text = os.strerror(error.errno) if error.errno else "input/output error"
    return Unavailable(f"the server's disk failed while {doing}: {text}", reason="STORAGE_FAILED")


@contextmanager
def _data_dir_errors() -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise _unusable("a file stands in its place or above it") from error
    except OSError as error:
        if error.errno in _FULL:
            raise storage_error(error, "opening the data directory") from error
        raise _unusable(error.strerror or "input/output error") from error


def _unusable(why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the data directory cannot be used: {why}; name a directory that this user can make or write to",
        reason="DATA_DIR_UNUSABLE",
    )


class Store:
    """The data directory of this server. Blocking; may be used from several threads.

    Creates the directory if need be. Raises FailedPrecondition (DATA_DIR_UNUSABLE), or (DATA_DIR_IN_USE) if another
    server has it, and ResourceExhausted (STORAGE_FULL).
    """

    def __init__(self, data_dir: str | Path) -> None:
        self.root = Path(data_dir)
        self.staging = self.root / "staging"
        self.artifacts = self.root / "artifacts"
        self.datasets = self.root / "datasets"
        self.jobs = self.root / "jobs"
        with _data_dir_errors():
            for folder in (self.root, self.staging, self.artifacts, self.datasets, self.jobs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Not inherited by child processes, so the lock ends with this process whatever outlives it.
            self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise FailedPrecondition(
                "another graftwork server uses this data directory; stop it or choose another with --data-dir",
                reason="DATA_DIR_IN_USE",
            ) from error

    def close(self) -> None:
        """Lets another server have the directory."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # ------------------------------------------------------------------------------------------ artifacts

    def new_staging(self) -> Path:
        """An empty folder for files that are not whole yet."""
        with storage_errors("preparing an upload"):
            folder = self.staging / secrets.token_hex(8)
            folder.mkdir(mode=0o700)
        return folder

    def artifact_path(self, digest: str) -> Path:
        """Where the files of `digest` are, or would be."""
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise ValueError(f"{digest!r} is no digest")
        return self.artifacts / match[1]

    def has_artifact(self, digest: str) -> bool:
        """Whether the files of `digest` are there, whole."""
        return self.artifact_path(digest).is_dir()

    def stored(self, digest: str) -> StoredArtifact:
        """An artifact that is there."""
        path = self.artifact_path(digest)
        with storage_errors("reading an adapter"):
            return StoredArtifact(digest, str(path), sum(entry.stat().st_size for entry in os.scandir(path)))

    def adopt(self, folder: Path, digest: str | None = None) -> StoredArtifact:
        """Moves `folder` (on the same file system) to its final place and gives its digest.

        Its manifest was written before (write_manifest). `digest`: as digest_of gave it, to not read all again. If the
        content is there already, `folder` is removed. On any error nothing is visible and `folder` is left as it is.
        """
        with storage_errors("publishing an adapter"):
            names = artifact_files(folder)
            size = sum((folder / name).stat().st_size for name in names)
            digest = digest or digest_of(folder)
            target = self.artifact_path(digest)
            for name in names:
                os.chmod(folder / name, 0o600)
                sync(folder / name)
            os.chmod(folder, 0o700)
            sync(folder)
            failpoints.reach("publish.before_rename")
            try:
                folder.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self.discard(folder)
            failpoints.reach("publish.after_rename")
            sync(self.artifacts)
        return StoredArtifact(digest, str(target), size)

    def remove_artifact(self, digest: str) -> None:
        """Removes the files of `digest`; at once invisible, even if the process ends meanwhile."""
        self.discard(self.artifact_path(digest))

    def discard(self, folder: Path) -> None:
        """Removes `folder`, if it is there."""
        doomed = self.staging / f"deleted-{secrets.token_hex(8)}"
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            return
        except OSError:
            doomed = folder
        shutil.rmtree(doomed, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ data sets and jobs

    def dataset_path(self, dataset_id: str) -> Path:
        """Where a data set's lines are, or would be."""
        return self.datasets / f"{dataset_id}.jsonl"

    def job_path(self, job_id: str) -> Path:
        """The folder of a job, or where it would be."""
        return self.jobs / job_id

    # ------------------------------------------------------------------------------------------ garbage

    def collect(self, digests: Collection[str], dataset_ids: Collection[str], job_ids: Collection[str]) -> list[str]:
        """Removes what is named by none of these; only at start, while no upload or job runs. Returns what went."""
        keep = {
            self.staging: set[str](),
            self.artifacts: {self.artifact_path(digest).name for digest in digests},
            self.datasets: {self.dataset_path(id).name for id in dataset_ids},
            self.jobs: set(job_ids),
        }
        removed: list[str] = []
        for folder, names in keep.items():
            for entry in sorted(folder.iterdir()):
                if entry.name in names:
                    continue
                removed.append(f"{folder.name}/{entry.name}")
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
        return removed


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def artifact_files(folder: Path) -> list[str]:
    """Names of the files in `folder`, sorted. Raises InvalidArgument if it has what no artifact may have."""
    names = []
    for entry in os.scandir(folder):
        if not entry.is_file(follow_symlinks=False):
            raise InvalidArgument(
                f"{entry.name[:100]!r} is no plain file; an adapter has neither folders nor links",
                reason="FILE_NAME_INVALID",
                field="files.name",
            )
        check_file_name(entry.name)
        names.append(entry.name)
    if len(names) > MAX_FILES:
        raise InvalidArgument(f"an adapter has at most {MAX_FILES} files", reason="TOO_MANY_FILES", field="files")
    return sorted(names)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, lower-case hexadecimal."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sha256.update(piece)
    return sha256.hexdigest()


def digest_of(folder: Path) -> str:
    """Identity of an artifact: SHA-256 over name, size and SHA-256 of each file, sorted by name, manifest included."""
    lines = [
        f"{name}\0{(folder / name).stat().st_size}\0{sha256_of(folder / name)}\n" for name in artifact_files(folder)
    ]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def manifest_end_tokens(folder: Path, vocab_size: int) -> list[int]:
    """Tokens that end a version's texts, by the manifest.json that a download brought along; none where it is no such.

    Of a manifest it is all that an upload keeps: everything else is found in the files themselves.
    """
    try:
        ids = json.loads((folder / MANIFEST).read_bytes())["end_token_ids"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return []
    if not isinstance(ids, list) or len(ids) > _MOST_END_TOKENS:
        return []
    return ids if all(type(id) is int and 0 <= id < vocab_size for id in ids) else []


def write_manifest(
    folder: Path,
    *,
    strategy: str,
    base_fingerprint: str,
    parameter_count: int,
    rank: int,
    created_by: str,
    end_token_ids: Sequence[int] = (),
) -> None:
    """Writes manifest.json, over any that is there. It holds no times: the same content has the same digest."""
    files: dict[str, Any] = {
        name: {"size_bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in artifact_files(folder)
        if name != MANIFEST
    }
    manifest = {
        "format": MANIFEST_FORMAT,
        "strategy": strategy,
        "base_fingerprint": base_fingerprint,
        "parameter_count": parameter_count,
        "rank": rank,
        "created_by": created_by,
        "files": files,
    }
    if end_token_ids:
        manifest["end_token_ids"] = list(end_token_ids)
    with storage_errors("writing a manifest"):
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
