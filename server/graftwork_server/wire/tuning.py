"""The messages of tuning jobs, from the front to the tuner and back."""

from __future__ import annotations

from typing import Any

import msgspec

from graftwork_server.errors import MESSAGE_CHARACTERS, ErrorBody
from graftwork_server.printable import make_printable
from graftwork_server.types import (
    ModelInfo,
    SettingChoice,
    TuningEstimate,
    TuningProgress,
    TuningResult,
)


class TunerTask(msgspec.Struct, frozen=True, kw_only=True):
    """A tuning job as engine and tuner see it. Paths are on this machine and the front's own."""

    job_id: str
    strategy: str
    config: dict[str, Any]
    dataset_path: str
    validation_path: str | None = None
    validation_fraction: float = 0.0
    job_dir: str
    """Checkpoints; outlives the tuner."""
    artifact_dir: str
    """Made by the tuner: the finished files. Exists whole or not at all (written beside it, then renamed)."""
    reported_step: int | None = None
    """The newest step that the front has a report of; None: it has all."""


class PrepareJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Validate a job's configuration and estimate it. Answered by Reply(result=PreparedJob)."""

    call_id: int
    strategy: str
    config: dict[str, Any]
    row_count: int
    total_tokens: int
    """Training tokens of one epoch."""
    held_out_rows: int = 0


class StartJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start a tuner. Answered by Reply(result=Started); then JobEvents follow until Finished or Failed.
    A job whose job_dir has a checkpoint resumes from it."""

    call_id: int
    job: TunerTask


class StopJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End a tuner, if it runs. Answered by Reply(result=Stopped) once its process is gone; no JobEvent follows."""

    call_id: int
    job_id: str


class PreparedJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`config` has every setting filled in and is plain JSON; `choices` says where the ones that matter come from."""

    config: dict[str, Any]
    estimate: TuningEstimate
    choices: list[SettingChoice] = []


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The tuner's process id."""

    pid: int


class Stopped(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """was_running tells whether there was something to stop."""

    was_running: bool


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step was done."""

    progress: TuningProgress


class Evaluated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Held-out loss per token after `step`."""

    step: int
    loss: float


class Checkpointed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A checkpoint of `step` is durable."""

    step: int


class Note(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Something worth reading: a resume, a warning."""

    text: str

    def __post_init__(self) -> None:
        make_printable(self, text=MESSAGE_CHARACTERS)


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """artifact_dir is complete."""

    result: TuningResult


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The job cannot go on."""

    error: ErrorBody


TunerEvent = Progress | Evaluated | Checkpointed | Note | Finished | Failed


class JobEvent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a tuner said."""

    job_id: str
    event: TunerEvent


class TensorLayout(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies in the shared weights: torch dtype name without "torch.", shape, byte offset."""

    name: str
    dtype: str
    shape: list[int]
    offset: int


class SharedWeightsInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How to map the base weights in another process. On CPU `fd` is inherited; on CUDA `ipc` opens the allocation."""

    device: str
    size_bytes: int
    layout: list[TensorLayout]
    fd: int | None = None
    ipc: list[Any] | None = None
    config_json: str = ""
    """The transformers configuration, as JSON."""
    quantization: str = "none"
    """Of the linear layers, whose tensors in the layout are then those of base/quantization.py."""


class StartTuning(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First message to a tuner."""

    job: TunerTask
    model: ModelInfo
    weights: SharedWeightsInfo
    gate_fd: int
    """Inherited file of 8 bytes: sequences the engine runs now (int64). The tuner yields while it is not 0."""
    threads: int
    yield_ms: int
    """Longest wait between two micro-batches while the engine is busy."""


TunerCommand = StartTuning
tuner_decoder: msgspec.msgpack.Decoder[TunerEvent] = msgspec.msgpack.Decoder(TunerEvent)
command_decoder: msgspec.msgpack.Decoder[TunerCommand] = msgspec.msgpack.Decoder(TunerCommand)
