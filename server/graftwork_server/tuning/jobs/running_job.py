"""A job's row and files while it runs: written in threads, and where the disk is full, once there is room."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from graftwork_server.errors import ErrorBody, GraftworkServerError
from graftwork_server.hub.database.records import JobRecord, RecordedEvent, StateChanged
from graftwork_server.process.threads import run_to_end
from graftwork_server.tuning.jobs.context import JobContext
from graftwork_server.types import JobState
from graftwork_server.wire.tuning import Note

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
LEAST_ROOM_BYTES = 1 << 20
"""Without as much, a paused job need not try again."""

_log = logging.getLogger("graftwork.tuning")
T = TypeVar("T")


class CancelledByUser(Exception):
    """Somebody wants the job to end."""


class RunningJob:
    """One job's row in the registry, and its folder. To be used on one event loop."""

    def __init__(self, record: JobRecord, context: JobContext) -> None:
        self.record = record
        """As it was written last."""
        self.folder = context.hub.store.job_path(record.job_id)
        self.artifact = self.folder / "artifact"
        """Where the tuner puts its finished files."""
        self.cancelled = asyncio.Event()
        """Set once somebody wants the job to end."""
        self._context = context
        self._jobs = context.hub.jobs
        self._pause_seconds = FIRST_PAUSE_SECONDS

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.record.job_id

    async def write(
        self, events: Sequence[RecordedEvent], *, error: ErrorBody | None = None, engine_losses: int | None = None
    ) -> None:
        """Appends to the job's events, and to its row what follows from them; where the disk is full, later."""
        self.record = await self.in_thread(
            lambda: self._jobs.record(self.job_id, events, error=error, engine_losses=engine_losses)
        )
        self._context.changed(self.job_id)

    async def write_once(self, events: Sequence[RecordedEvent], error: ErrorBody | None = None) -> None:
        """As write, but raises ResourceExhausted (STORAGE_FULL) where the disk is full."""
        self.record = await run_to_end(self._jobs.record, self.job_id, events, error=error)
        self._context.changed(self.job_id)

    async def discard_files(self) -> None:
        """Removes the job's folder."""
        await self.in_thread(lambda: self._context.hub.store.discard(self.folder))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work`; where the disk is full, once there is room: `work` can be repeated then.

        Raises CancelledByUser while it waits for room.
        """
        while True:
            try:
                return await run_to_end(work)
            except GraftworkServerError as error:
                if error.reason != "STORAGE_FULL":
                    raise
            await self.wait_for_room()

    def has_progressed(self) -> None:
        """It found room and used it: the next full disk is another one."""
        self._pause_seconds = FIRST_PAUSE_SECONDS

    async def wait_for_room(self) -> None:
        """Pauses the job until the disk has room, and longer each time that it then was full again all the same.

        Raises CancelledByUser.
        """
        text = "paused: the server's disk is full; the job goes on when there is room"
        _log.warning("job %s is %s", self.job_id, text)
        with contextlib.suppress(GraftworkServerError):  # the disk may be too full to say so
            await self.write_once([Note(text=text), StateChanged(state=JobState.PAUSED)])
        needed = max(self.record.estimate.artifact_bytes, LEAST_ROOM_BYTES)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_seconds):
                    await self.cancelled.wait()
            if self.cancelled.is_set():
                raise CancelledByUser
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
            if self._context.hub.store.free_bytes() >= needed:
                break
        if self.record.state is JobState.PAUSED:
            with contextlib.suppress(GraftworkServerError):
                await self.write_once([StateChanged(state=JobState.RUNNING)])
