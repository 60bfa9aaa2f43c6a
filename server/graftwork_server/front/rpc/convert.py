"""Between the wire's messages and the server's nouns; no rules here except what a message can or cannot say."""

from __future__ import annotations

import datetime
import math
from typing import Any

from google.protobuf import json_format, struct_pb2, timestamp_pb2

from graftwork.v1 import adapters_pb2, strategies_pb2, tuning_pb2
from graftwork_server.errors import InvalidArgument, Violation
from graftwork_server.hub.database.records import (
    DatasetRecord,
    JobEventRecord,
    JobRecord,
    StateChanged,
    TuningJobSpec,
    VersionRecord,
)
from graftwork_server.names import parse_dataset
from graftwork_server.tuning.data import DatasetReport
from graftwork_server.types import (
    DatasetFormat,
    JobState,
    LoadReport,
    StrategyInfo,
    TuningEstimate,
    TuningProgress,
)
from graftwork_server.wire.tuning import Checkpointed, Evaluated, Note, Progress


def timestamp(time: datetime.datetime) -> timestamp_pb2.Timestamp:
    """A time of the registry on the wire."""
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(time)
    return message


def adapter_message(version: VersionRecord, *, loaded: bool) -> adapters_pb2.Adapter:
    """An adapter as seen through one of its versions."""
    return adapters_pb2.Adapter(
        name=f"adapters/{version.adapter_id}",
        adapter_id=version.adapter_id,
        version=version.number,
        digest=version.digest,
        strategy=version.strategy,
        base_fingerprint=version.base_fingerprint,
        size_bytes=version.size_bytes,
        parameter_count=version.parameter_count,
        loaded=loaded,
        create_time=timestamp(version.create_time),
        tuning_job=f"tuningJobs/{version.tuning_job}" if version.tuning_job else "",
        rank=version.rank,
        pinned=version.pinned,
        follows_version=version.follows,
    )


def load_report_message(report: LoadReport, load_ms: float) -> adapters_pb2.LoadReport:
    """What a load bound; `load_ms` as the caller saw it."""
    return adapters_pb2.LoadReport(
        modules_bound=report.modules_bound,
        rank=report.rank,
        device_bytes=report.device_bytes,
        load_ms=load_ms,
        already_loaded=report.already_loaded,
    )


def strategy_message(info: StrategyInfo) -> strategies_pb2.Strategy:
    """A strategy, or why it could not be loaded."""
    return strategies_pb2.Strategy(
        name=f"strategies/{info.id}",
        strategy_id=info.id,
        version=info.version,
        api_version=info.api_version,
        distribution=info.distribution,
        description=info.description,
        capabilities=info.capabilities,
        config_json_schema=info.config_json_schema,
        load_error=info.load_error,
    )


# ---------------------------------------------------------------------------------------------- data sets


def format_value(format: DatasetFormat | None) -> tuning_pb2.DatasetFormat.ValueType:
    """The wire's name of a form."""
    return tuning_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{format.value if format else 'UNSPECIFIED'}")


def dataset_message(dataset: DatasetRecord) -> tuning_pb2.Dataset:
    """A stored data set."""
    return tuning_pb2.Dataset(
        name=f"datasets/{dataset.dataset_id}",
        dataset_id=dataset.dataset_id,
        display_name=dataset.display_name,
        format=format_value(dataset.format),
        row_count=dataset.row_count,
        size_bytes=dataset.size_bytes,
        create_time=timestamp(dataset.create_time),
    )


def report_message(report: DatasetReport) -> tuning_pb2.ValidateDatasetResponse:
    """What the check of a data set found."""
    return tuning_pb2.ValidateDatasetResponse(
        format=format_value(report.format),
        row_count=report.row_count,
        errors=[tuning_pb2.LineError(line=error.line, reason=error.reason) for error in report.errors],
        error_count=report.error_count,
        total_tokens=report.total_tokens,
        loss_tokens=report.loss_tokens,
        longest_row_tokens=report.longest_row_tokens,
        cut_rows=report.cut_rows,
        valid=report.valid,
        more_errors=[
            tuning_pb2.LineErrorKind(reason=kind.reason, count=kind.count, first_line=kind.first_line)
            for kind in report.more_errors
        ],
        warnings=report.warnings,
    )


# ---------------------------------------------------------------------------------------------- tuning jobs


def tuning_spec(spec: tuning_pb2.TuningJobSpec) -> TuningJobSpec:
    """The job that a client asks for; what it may hold is the job manager's to say.

    Raises InvalidArgument for names that are none and for settings that no JSON can hold.
    """
    violations = _unusable_numbers(spec.config, "spec.config")
    if violations:
        message = "; ".join(f"{violation.field} {violation.description}" for violation in violations)
        raise InvalidArgument(message, reason="INVALID_PARAMETER", violations=violations)
    validation = spec.validation_dataset
    return TuningJobSpec(
        strategy=spec.strategy,
        dataset_id=parse_dataset(spec.dataset, "spec.dataset") if spec.dataset else "",
        validation_dataset_id=parse_dataset(validation, "spec.validation_dataset") if validation else "",
        validation_fraction=spec.validation_fraction if spec.HasField("validation_fraction") else None,
        adapter_id=spec.adapter_id,
        config={key: _plain(value) for key, value in json_format.MessageToDict(spec.config).items()},
        load=spec.load,
        new_version=spec.new_version,
    )


def job_message(job: JobRecord) -> tuning_pb2.TuningJob:
    """A job as the registry knows it."""
    spec = job.spec
    message = tuning_pb2.TuningJob(
        name=f"tuningJobs/{job.job_id}",
        job_id=job.job_id,
        spec=tuning_pb2.TuningJobSpec(
            strategy=spec.strategy,
            dataset=f"datasets/{spec.dataset_id}",
            validation_dataset=f"datasets/{spec.validation_dataset_id}" if spec.validation_dataset_id else "",
            validation_fraction=spec.validation_fraction,
            adapter_id=spec.adapter_id,
            load=spec.load,
            new_version=spec.new_version,
        ),
        state=state_value(job.state),
        error=job.error.message if job.error else "",
        error_reason=job.error.reason if job.error else "",
        estimate=_estimate_message(job.estimate),
        validation_loss=job.validation_loss,
        follows_version=job.follows,
    )
    message.spec.config.update(spec.config)
    for choice in spec.choices:
        chosen = message.choices.add(key=choice.key, reason=choice.reason, automatic=choice.automatic)
        json_format.ParseDict(choice.value, chosen.value)
    if job.progress is not None:
        message.progress.CopyFrom(progress_message(job.progress))
    if job.result is not None:
        message.result.CopyFrom(_result_message(job))
    for field in ("create_time", "start_time", "end_time"):
        time = getattr(job, field)
        if time is not None:
            getattr(message, field).FromDatetime(time)
    return message


def event_message(record: JobEventRecord) -> tuning_pb2.TuningEvent:
    """Something that happened to a job."""
    message = tuning_pb2.TuningEvent(sequence=record.sequence, time=timestamp(record.time))
    match record.event:
        case StateChanged(state=state):
            message.state = state_value(state)
        case Progress(progress=progress):
            message.progress.CopyFrom(progress_message(progress))
        case Evaluated(step=step, loss=loss):
            message.evaluation.step, message.evaluation.loss = step, loss
        case Checkpointed(step=step):
            message.checkpoint_step = step
        case Note(text=text):
            message.message = text
    return message


def state_value(state: JobState) -> tuning_pb2.TuningJobState.ValueType:
    """The wire's name of a state."""
    return tuning_pb2.TuningJobState.Value(f"TUNING_JOB_STATE_{state.value}")


def progress_message(progress: TuningProgress) -> tuning_pb2.TuningProgress:
    """How far a job is."""
    return tuning_pb2.TuningProgress(
        step=progress.step,
        total_steps=progress.total_steps,
        loss=progress.loss,
        learning_rate=progress.learning_rate,
        tokens_per_second=progress.tokens_per_second,
        eta_ms=progress.eta_ms,
        seen_tokens=progress.seen_tokens,
    )


def _estimate_message(estimate: TuningEstimate) -> tuning_pb2.TuningEstimate:
    return tuning_pb2.TuningEstimate(
        trained_parameters=estimate.trained_parameters,
        memory_bytes=estimate.memory_bytes,
        artifact_bytes=estimate.artifact_bytes,
        total_steps=estimate.total_steps,
    )


def _result_message(job: JobRecord) -> tuning_pb2.TuningResult:
    assert job.result is not None
    return tuning_pb2.TuningResult(
        adapter_version=job.adapter_version or "",
        trained_parameters=job.result.trained_parameters,
        peak_memory_bytes=job.result.peak_memory_bytes,
        artifact_bytes=job.result.artifact_bytes,
        train_ms=job.result.train_ms,
        final_loss=job.result.final_loss,
        validation_loss=job.result.validation_loss,
        published_step=job.result.published_step,
    )


def _unusable_numbers(struct: struct_pb2.Struct, path: str) -> list[Violation]:
    """NaN and infinity have no place in JSON, where settings are checked and stored."""
    violations: list[Violation] = []
    for key, value in struct.fields.items():
        violations += _unusable(value, f"{path}.{key[:60]}")
    return violations


def _unusable(value: struct_pb2.Value, path: str) -> list[Violation]:
    match value.WhichOneof("kind"):
        case "number_value" if not math.isfinite(value.number_value):
            return [Violation(path, f"is {value.number_value:g}; a finite number is accepted")]
        case "struct_value":
            return _unusable_numbers(value.struct_value, path)
        case "list_value":
            return [violation for item in value.list_value.values for violation in _unusable(item, path)]
        case None:
            return [Violation(path, "has no value")]
    return []


def _plain(value: Any) -> Any:
    """protobuf's Struct knows doubles only; a setting that was written as 8 is 8 again."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
