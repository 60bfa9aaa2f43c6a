"""The hub as one thing: opened once by the front, it holds the store, the registry and what connects them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from graftwork_server.hub.database.connection import Database
from graftwork_server.hub.database.records import NewVersion, VersionRecord
from graftwork_server.hub.datasets import Datasets
from graftwork_server.hub.files.data_dir import REGISTRY
from graftwork_server.hub.files.manifest import write_manifest
from graftwork_server.hub.files.store import Store
from graftwork_server.hub.job_registry import JobRegistry
from graftwork_server.hub.leases import Leases
from graftwork_server.hub.registry import Registry, RequestKey
from graftwork_server.hub.resolver import Resolver
from graftwork_server.types import ArtifactInfo


class Hub:
    """Opens the data directory: locks it, brings the database to this server's schema, removes garbage. Blocking.

    Raises FailedPrecondition (DATA_DIR_UNUSABLE, DATA_DIR_IN_USE, SCHEMA_NEWER, REGISTRY_DAMAGED) or a storage error.
    """

    def __init__(self, data_dir: str | Path) -> None:
        self.store = Store(data_dir)
        try:
            self._database = Database.at(self.store.root / REGISTRY)
        except BaseException:
            self.store.close()
            raise
        self.registry = Registry(self._database)
        self.jobs = JobRegistry(self._database)
        self.datasets = Datasets(self._database, self.store)
        self.leases = Leases(self.store, self.registry)
        self.resolver = Resolver(self.store, self.registry)
        self._collect()

    def close(self) -> None:
        """Lets another server have the data directory."""
        self._database.close()
        self.store.close()

    def publish(
        self,
        folder: Path,
        *,
        adapter_id: str,
        info: ArtifactInfo,
        base_fingerprint: str,
        adapter_may_exist: bool,
        end_token_ids: Sequence[int] = (),
        request: RequestKey | None = None,
        sha256: Mapping[str, str] | None = None,
    ) -> VersionRecord:
        """Makes the uploaded files in `folder` the next version of an adapter, whole or not at all. Blocking.

        `info` is what the engine found in them, `end_token_ids` what ends its texts, `sha256` what is known of their
        hashes, by name. Raises AlreadyExists (ADAPTER_EXISTS), storage errors.
        """
        digest = write_manifest(
            folder,
            strategy=info.strategy,
            base_fingerprint=base_fingerprint,
            parameter_count=info.parameter_count,
            rank=info.rank,
            created_by="upload",
            end_token_ids=end_token_ids,
            sha256=sha256,
        )
        with self.leases.claimed(digest):
            stored = self.store.adopt(folder, digest)
            version = NewVersion(
                adapter_id=adapter_id,
                digest=digest,
                strategy=info.strategy,
                base_fingerprint=base_fingerprint,
                size_bytes=stored.size_bytes,
                parameter_count=info.parameter_count,
                rank=info.rank,
                end_token_ids=list(end_token_ids),
            )
            return self.registry.add_version(version, adapter_may_exist=adapter_may_exist, request=request)

    def delete_adapter(self, adapter_id: str) -> list[VersionRecord]:
        """Forgets an adapter; its files go once nobody uses them. Blocking. Raises NotFound (ADAPTER_NOT_FOUND)."""
        versions = self.registry.delete_adapter(adapter_id)
        for digest in {version.digest for version in versions}:
            self.leases.remove_if_unused(digest)
        return versions

    def delete_version(self, adapter_id: str, number: int) -> tuple[VersionRecord, int]:
        """Forgets a version, as registry.delete_version; its files go once nobody uses them. Blocking."""
        version, newest = self.registry.delete_version(adapter_id, number)
        self.leases.remove_if_unused(version.digest)
        return version, newest

    def _collect(self) -> None:
        jobs = self.jobs.unfinished()
        announced = {job.publication.digest for job in jobs if job.publication is not None}
        self.store.collect(
            digests=self.registry.digests() | announced,
            dataset_ids=self.datasets.ids(),
            job_ids={job.job_id for job in jobs},
        )
