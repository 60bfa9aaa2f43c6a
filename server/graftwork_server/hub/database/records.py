"""What the registry holds, as plain data: these leave the hub, rows of the database do not. Times are UTC."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec

from graftwork_server.errors import ErrorBody
from graftwork_server.names import version_name
from graftwork_server.types import DatasetFormat, JobState, SettingChoice, TuningEstimate, TuningProgress, TuningResult
from graftwork_server.wire.tuning import Checkpointed, Evaluated, Note, Progress


class VersionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One version of an adapter."""

    adapter_id: str
    number: int
    digest: str
    strategy: str
    base_fingerprint: str
    size_bytes: int
    parameter_count: int
    rank: int
    tuning_job: str | None = None
    """Id of the job that made it."""
    pinned: bool = False
    """Kept on the device."""
    end_token_ids: list[int] = []
    """Tokens that it was taught to end with; they end its texts beside those of the base model."""
    follows: int = 0
    """Number of the version that the name served before; 0: none."""
    create_time: datetime.datetime

    @property
    def name(self) -> str:
        """Resource name: "adapters/{id}/versions/{n}"."""
        return version_name(self.adapter_id, self.number)


class NewVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version to be published; its files are in the store."""

    adapter_id: str
    digest: str
    strategy: str
    base_fingerprint: str
    size_bytes: int
    parameter_count: int
    rank: int
    tuning_job: str | None = None
    end_token_ids: list[int] = []


class DatasetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One data set."""

    dataset_id: str
    display_name: str
    format: DatasetFormat
    row_count: int
    size_bytes: int
    create_time: datetime.datetime


class TuningJobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a tuning job is to do, see tuning.proto; "" for no validation data set."""

    strategy: str
    dataset_id: str
    validation_dataset_id: str = ""
    validation_fraction: float | None = None
    """None in a request: not said."""
    adapter_id: str
    config: dict[str, Any] = {}
    load: bool = False
    new_version: bool = True
    """Whether the adapter may exist. True where it is not written: in jobs from before anybody was asked."""
    choices: list[SettingChoice] = []
    """Of a job: where settings come from, in the request's order and then those chosen by the server."""


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is about to publish. Written before its files are moved, so a restart knows where to look."""

    digest: str
    parameter_count: int
    rank: int
    result: TuningResult


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One tuning job."""

    job_id: str
    spec: TuningJobSpec
    """With the strategy's defaults filled in."""
    base_fingerprint: str
    state: JobState
    estimate: TuningEstimate
    progress: TuningProgress | None = None
    validation_loss: float | None = None
    publication: Publication | None = None
    result: TuningResult | None = None
    adapter_version: str | None = None
    """Resource name of the published version."""
    error: ErrorBody | None = None
    engine_losses: int = 0
    """Engines that died under it since its last checkpoint."""
    follows: int = 0
    """Number of the version that its adapter's name serves before its own; 0: none."""
    create_time: datetime.datetime
    start_time: datetime.datetime | None = None
    end_time: datetime.datetime | None = None


class StateChanged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The job is in this state now."""

    state: JobState


RecordedEvent = StateChanged | Progress | Evaluated | Checkpointed | Note


class JobEventRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a job. `sequence` counts from 1 without gaps within a job."""

    sequence: int
    time: datetime.datetime
    event: RecordedEvent
