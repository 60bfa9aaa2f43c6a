"""How a job's result becomes a version: whole or not at all, whenever this process is killed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from graftwork_server.durable import storage_errors
from graftwork_server.errors import GraftworkServerError, Unavailable
from graftwork_server.hub.database.records import NewVersion, Publication, RecordedEvent
from graftwork_server.hub.files.manifest import artifact_files, write_manifest
from graftwork_server.hub.files.safetensors_check import check_safetensors
from graftwork_server.hub.files.store import StoredArtifact
from graftwork_server.logs import log_event
from graftwork_server.process import failpoints
from graftwork_server.tuning.jobs.context import JobContext, check_still_possible
from graftwork_server.tuning.jobs.running_job import RunningJob
from graftwork_server.types import AdapterRef, TuningResult
from graftwork_server.wire.tuning import Note

_log = logging.getLogger("graftwork.tuning")


class JobPublisher:
    """Publishes what the tuner of one job left in its folder."""

    def __init__(self, job: RunningJob, context: JobContext) -> None:
        self._job = job
        self._context = context
        self._hub = context.hub

    async def publish(self, result: TuningResult) -> bool:
        """Makes what the tuner left a version; false if the engine was lost, which has to look at it first.

        In order: the row says what will be published; the files move to their place; one transaction makes the version
        and ends the job. Killed before the move, the files are still the job's; after it, the row tells where they
        are; so the next start completes it (publish_announced). A version is visible only from the transaction on.
        """
        try:
            info = await self._context.engine.inspect(str(self._job.artifact), self._job.record.spec.strategy)
        except Unavailable:
            return False
        await self._complete(await self._job.in_thread(lambda: self._announce(info.parameter_count, info.rank, result)))
        return True

    async def publish_announced(self) -> bool:
        """Completes what an earlier run of the server was about to publish; false if there is nothing."""
        announced = self._job.record.publication
        if announced is None:
            return False
        check_still_possible(self._job.record, self._context)
        if not self._hub.store.has_artifact(announced.digest):
            if not self._job.artifact.is_dir():
                await self._job.in_thread(lambda: self._hub.jobs.announce(self._job.job_id, None))
                return False
            again = announced
            announced = await self._job.in_thread(
                lambda: self._announce(again.parameter_count, again.rank, again.result)
            )
        await self._complete(announced)
        return True

    def _announce(self, parameter_count: int, rank: int, result: TuningResult) -> Publication:
        with storage_errors("publishing a job's result"):
            for name in artifact_files(self._job.artifact):
                if name.endswith(".safetensors"):
                    check_safetensors(self._job.artifact / name)
            digest = write_manifest(
                self._job.artifact,
                strategy=self._job.record.spec.strategy,
                base_fingerprint=self._job.record.base_fingerprint,
                parameter_count=parameter_count,
                rank=rank,
                created_by="tuning",
                end_token_ids=result.end_token_ids,
            )
        publication = Publication(digest=digest, parameter_count=parameter_count, rank=rank, result=result)
        self._hub.jobs.announce(self._job.job_id, publication)
        failpoints.reach("publish.announced")
        return publication

    async def _complete(self, publication: Publication) -> None:
        claim = contextlib.ExitStack()
        claim.enter_context(self._hub.leases.claimed(publication.digest))
        try:
            stored = await self._job.in_thread(lambda: self._move_to_store(publication.digest))
            notes = await self._load_if_asked(stored)
            await self._job.in_thread(lambda: self._commit(publication, stored, notes))
        finally:
            await self._job.in_thread(claim.close)
        self._context.changed(self._job.job_id)

    def _move_to_store(self, digest: str) -> StoredArtifact:
        if self._job.artifact.is_dir():
            return self._hub.store.adopt(self._job.artifact, digest)
        return self._hub.store.stored(digest)

    async def _load_if_asked(self, stored: StoredArtifact) -> list[RecordedEvent]:
        if not self._job.record.spec.load:
            return []
        name = f"adapters/{self._job.record.spec.adapter_id}"
        adapter = AdapterRef(digest=stored.digest, path=stored.path, strategy=self._job.record.spec.strategy, name=name)
        try:
            await self._context.engine.load(adapter)
        except GraftworkServerError as error:
            return [Note(text=f"published, but not loaded: {error.message}")]
        return []

    def _commit(self, publication: Publication, stored: StoredArtifact, notes: Sequence[RecordedEvent]) -> None:
        version = NewVersion(
            adapter_id=self._job.record.spec.adapter_id,
            digest=stored.digest,
            strategy=self._job.record.spec.strategy,
            base_fingerprint=self._job.record.base_fingerprint,
            size_bytes=stored.size_bytes,
            parameter_count=publication.parameter_count,
            rank=publication.rank,
            tuning_job=self._job.job_id,
            end_token_ids=publication.result.end_token_ids,
        )
        failpoints.reach("publish.before_commit")
        _, published = self._hub.jobs.publish(self._job.job_id, version, publication.result, notes)
        result = publication.result
        log_event(
            _log,
            "job published",
            job=self._job.job_id,
            adapter=published.name,
            train_ms=result.train_ms,
            final_loss=round(result.final_loss, 4),
        )
        failpoints.reach("publish.after_commit")
