"""Tuning jobs and their events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias

JobState: TypeAlias = Literal["unspecified", "pending", "running", "paused", "succeeded", "failed", "cancelled"]
EventKind: TypeAlias = Literal["state", "progress", "evaluation", "checkpoint", "message", "unknown"]


@dataclass(frozen=True)
class TuningSpec:
    """What a job tunes, with the strategy's defaults filled in."""

    strategy: str
    dataset: str
    validation_dataset: str
    validation_fraction: float
    adapter_id: str
    config: Mapping[str, Any]
    load: bool
    new_version: bool = False


@dataclass(frozen=True)
class SettingChoice:
    """Where a setting of a job comes from: chosen by the server (automatic) or set by the request, and why."""

    key: str
    value: Any
    reason: str
    automatic: bool


@dataclass(frozen=True)
class TuningProgress:
    """How far a job is: optimizer steps, mean loss per token of the last step, learning rate, training tokens/s."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    eta_ms: int
    seen_tokens: int


@dataclass(frozen=True)
class TuningEvaluation:
    """Mean held-out loss per token after a step."""

    step: int
    loss: float


@dataclass(frozen=True)
class TuningEstimate:
    """What a job is expected to take; memory_bytes comes on top of the resident base weights."""

    trained_parameters: int
    memory_bytes: int
    artifact_bytes: int
    total_steps: int


@dataclass(frozen=True)
class TuningResult:
    """What a job left behind.

    adapter_version is "adapters/{id}/versions/{n}". final_loss is the mean training loss of the last tenth of the
    steps; validation_loss is the published weights', None where no rows are held out; published_step is the step after
    which the weights were as they are published, 0 if the server does not say.
    """

    adapter_version: str
    trained_parameters: int
    peak_memory_bytes: int
    artifact_bytes: int
    train_ms: int
    final_loss: float
    validation_loss: float | None
    published_step: int = 0


@dataclass(frozen=True)
class TuningEvent:
    """Something that happened to a job. sequence counts from 1 without gaps; kind names the one field that is set."""

    sequence: int
    time: datetime | None
    kind: EventKind
    state: JobState | None = None
    progress: TuningProgress | None = None
    evaluation: TuningEvaluation | None = None
    checkpoint_step: int | None = None
    message: str | None = None


@dataclass(frozen=True)
class TuningJobInfo:
    """A tuning job at one moment. result is set once it succeeded, error ("" otherwise) once it failed.

    follows_version: the version that the adapter's name serves before the job's own is published; 0: none.
    """

    name: str
    job_id: str
    spec: TuningSpec
    state: JobState
    progress: TuningProgress | None
    result: TuningResult | None
    error: str
    estimate: TuningEstimate | None
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    validation_loss: float | None
    follows_version: int = 0
    choices: tuple[SettingChoice, ...] = ()
    """Settings that the request set or the server chose; others are the strategy's defaults."""
    error_reason: str = ""
    """The kind of error, such as OUT_OF_MEMORY, once it failed."""

    @property
    def done(self) -> bool:
        """True once the job has ended, however it did."""
        return self.state in ("succeeded", "failed", "cancelled")
