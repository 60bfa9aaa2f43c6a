"""The files of adapters, data sets and jobs, under one data directory that one server uses at a time.

    graftwork.json, lock  see data_dir.py
    registry.db           see database/connection.py
    staging/              uploads that are not whole yet, and folders on their way to deletion
    artifacts/{sha256}/   the files of a version; the name is made from their content
    datasets/{id}.jsonl   a data set; the id is made from its content
    jobs/{id}/            checkpoints of a running job, and its finished files until they are published

What stands under artifacts/ and datasets/ came there by one rename of files that were durable before, so it is whole
or not there. What no row of the registry names is garbage, removed at the next start.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from graftwork_server.durable import storage_errors, sync
from graftwork_server.errors import InvalidArgument
from graftwork_server.hub.files.data_dir import open_data_dir
from graftwork_server.process import failpoints

MANIFEST = "manifest.json"
_MOST_END_TOKENS = 64
_MOST_CONFIG_BYTES = 1 << 20
MANIFEST_FORMAT = 1
FILE_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
MAX_FILES = 1000
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_OURS = {
    "staging": re.compile(r"([0-9a-f]{16}(\.jsonl)?|deleted-[0-9a-f]{16})"),
    "artifacts": re.compile(r"[0-9a-f]{64}"),
    "datasets": re.compile(r"ds-[0-9a-f]{32}\.jsonl"),
    "jobs": re.compile(r"job-[0-9a-f]{16}"),
}
"""Names that the server gives, by folder."""
_PIECE = 1 << 20

_log = logging.getLogger(__name__)


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


class Store:
    """The data directory of this server. Blocking; may be used from several threads.

    Creates the directory if need be; raises as open_data_dir does.
    """

    def __init__(self, data_dir: str | Path) -> None:
        # A link to the directory is its user's own; from here on, none is followed.
        self.root = Path(os.path.realpath(data_dir))
        self.staging = self.root / "staging"
        self.artifacts = self.root / "artifacts"
        self.datasets = self.root / "datasets"
        self.jobs = self.root / "jobs"
        self._lock = open_data_dir(self.root)

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

    def free_bytes(self) -> int:
        """Room on the disk."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    # ------------------------------------------------------------------------------------------ garbage

    def collect(self, digests: Collection[str], dataset_ids: Collection[str], job_ids: Collection[str]) -> list[str]:
        """Removes what is named by none of these; only at start, while no upload or job runs. Returns what went.

        What has no name of ours is somebody else's: it is left where it is, and logged. No link is followed.
        """
        keep = {
            self.staging: set[str](),
            self.artifacts: {self.artifact_path(digest).name for digest in digests},
            self.datasets: {self.dataset_path(id).name for id in dataset_ids},
            self.jobs: set(job_ids),
        }
        removed: list[str] = []
        for folder, names in keep.items():
            for entry in sorted(folder.iterdir()):
                shown = f"{folder.name}/{entry.name}"
                if entry.name in names:
                    continue
                if not _OURS[folder.name].fullmatch(entry.name) or entry.is_symlink():
                    _log.warning("%a is none of the server's files and is left where it is", shown)
                    continue
                _log.info("removing %s, a leftover of an earlier run", shown)
                removed.append(shown)
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
        return removed


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


def uploaded_end_tokens(folder: Path, vocab_size: int, base_ends: Collection[int]) -> list[int]:
    """Tokens that end a version's texts, by the files that were uploaded: by the manifest.json that a download brought
    along, or else, as transformers reads a whole checkpoint, by its generation_config.json or config.json, as far as
    they are none of `base_ends`, the base's own. [] if none of these says it.

    Of a manifest it is all that an upload keeps: everything else is found in the files themselves.
    """
    ids = _token_ids(folder / MANIFEST, "end_token_ids", vocab_size)
    if ids is not None:
        return ids
    for name in ("generation_config.json", "config.json"):
        ids = _token_ids(folder / name, "eos_token_id", vocab_size)
        if ids is not None:
            return [id for id in ids if id not in base_ends]
    return []


def _token_ids(file: Path, key: str, vocab_size: int) -> list[int] | None:
    """One token id or several, in a JSON file of a stranger's; None where there are none that could be used."""
    try:
        if file.stat().st_size > _MOST_CONFIG_BYTES:
            return None
        ids = json.loads(file.read_bytes())[key]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    ids = ids if isinstance(ids, list) else [ids]
    usable = 0 < len(ids) <= _MOST_END_TOKENS and all(type(id) is int and 0 <= id < vocab_size for id in ids)
    return ids if usable else None


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
