"""What the tests of jobs share: making a job, and reading what happened to it."""

from __future__ import annotations

import os
from typing import Any

from tests.server.tuning.jobs.scripted import ROWS, add_dataset

from graftwork_server.hub.database.records import JobEventRecord, JobRecord, StateChanged, TuningJobSpec
from graftwork_server.hub.hub import Hub
from graftwork_server.tuning.jobs.manager import JobManager
from graftwork_server.types import JobState
from graftwork_server.wire.tuning import Note


def spec(dataset_id: str, **changes: Any) -> TuningJobSpec:
    return TuningJobSpec(**({"strategy": "lora", "dataset_id": dataset_id, "adapter_id": "a"} | changes))


async def create(hub: Hub, manager: JobManager, **changes: Any) -> JobRecord:
    return await manager.create(spec(**({"dataset_id": add_dataset(hub, ROWS)} | changes)))


async def events_of(manager: JobManager, job_id: str, after: int = 0) -> list[JobEventRecord]:
    return [event async for event in manager.watch(job_id, after)]


def states(events: list[JobEventRecord]) -> list[JobState]:
    return [event.event.state for event in events if isinstance(event.event, StateChanged)]


def notes(events: list[JobEventRecord]) -> list[str]:
    return [event.event.text for event in events if isinstance(event.event, Note)]


def assert_nothing_published(hub: Hub) -> None:
    assert hub.registry.digests() == set()
    assert os.listdir(hub.store.artifacts) == []
    assert os.listdir(hub.store.jobs) == []
