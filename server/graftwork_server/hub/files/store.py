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
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

import msgspec

from graftwork_server.durable import storage_errors, sync
from graftwork_server.hub.files.data_dir import open_data_dir
from graftwork_server.hub.files.manifest import artifact_files
from graftwork_server.names import DATASET_ID, DIGEST, JOB_ID
from graftwork_server.process import failpoints

_OURS = {
    "staging": re.compile(r"([0-9a-f]{16}(\.jsonl)?|deleted-[0-9a-f]{16})"),
    "artifacts": re.compile(r"[0-9a-f]{64}"),
    "datasets": re.compile(DATASET_ID.pattern + r"\.jsonl"),
    "jobs": JOB_ID,
}
"""Names that the server gives, by folder."""

_log = logging.getLogger(__name__)


class StoredArtifact(msgspec.Struct, frozen=True):
    """An artifact in its final place. `digest` is "sha256:" and 64 hexadecimal digits."""

    digest: str
    path: str
    size_bytes: int


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
        match = DIGEST.fullmatch(digest)
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

    def adopt(self, folder: Path, digest: str) -> StoredArtifact:
        """Moves `folder` (on the same file system) to its final place.

        `digest`: as write_manifest gave it. If the content is there already, `folder` is removed. On any error nothing
        is visible and `folder` is left as it is.
        """
        with storage_errors("publishing an adapter"):
            names = artifact_files(folder)
            size = sum((folder / name).stat().st_size for name in names)
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
