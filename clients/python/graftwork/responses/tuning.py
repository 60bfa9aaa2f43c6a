"""Answers of TuningService about jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwork import types
from graftwork.responses.fields import from_message, json_value, optional, time
from graftwork.transport.calls import Page
from graftwork.v1 import tuning_pb2 as pb

_STATES: Mapping[int, types.JobState] = {
    pb.TUNING_JOB_STATE_PENDING: "pending",
    pb.TUNING_JOB_STATE_RUNNING: "running",
    pb.TUNING_JOB_STATE_PAUSED: "paused",
    pb.TUNING_JOB_STATE_SUCCEEDED: "succeeded",
    pb.TUNING_JOB_STATE_FAILED: "failed",
    pb.TUNING_JOB_STATE_CANCELLED: "cancelled",
}


def job(message: pb.TuningJob) -> types.TuningJobInfo:
    """A tuning job."""
    return from_message(
        types.TuningJobInfo,
        message,
        spec=from_message(types.TuningSpec, message.spec, config=json_value(message.spec.config)),
        state=_STATES.get(message.state, "unspecified"),
        progress=_progress(message.progress) if message.HasField("progress") else None,
        result=_result(message.result) if message.HasField("result") else None,
        estimate=from_message(types.TuningEstimate, message.estimate) if message.HasField("estimate") else None,
        create_time=time(message, "create_time"),
        start_time=time(message, "start_time"),
        end_time=time(message, "end_time"),
        validation_loss=optional(message, "validation_loss"),
        choices=tuple(
            from_message(types.SettingChoice, choice, value=json_value(choice.value)) for choice in message.choices
        ),
    )


def _progress(message: pb.TuningProgress) -> types.TuningProgress:
    return from_message(types.TuningProgress, message)


def _result(message: pb.TuningResult) -> types.TuningResult:
    return from_message(types.TuningResult, message, validation_loss=optional(message, "validation_loss"))


def job_of(
    message: pb.CreateTuningJobResponse | pb.GetTuningJobResponse | pb.CancelTuningJobResponse,
) -> types.TuningJobInfo:
    """The tuning job of an answer."""
    return job(message.job)


def job_page(message: pb.ListTuningJobsResponse) -> Page[types.TuningJobInfo]:
    """One page of jobs."""
    return Page(tuple(job(item) for item in message.jobs), message.next_page_token)


def event(message: pb.WatchTuningJobResponse) -> types.TuningEvent:
    """Something that happened to a job. One that only a newer client knows has the kind "unknown"."""
    item = message.event
    base: dict[str, Any] = {"sequence": item.sequence, "time": time(item, "time")}
    match item.WhichOneof("event"):
        case "state":
            return types.TuningEvent(**base, kind="state", state=_STATES.get(item.state, "unspecified"))
        case "progress":
            return types.TuningEvent(**base, kind="progress", progress=_progress(item.progress))
        case "evaluation":
            evaluation = from_message(types.TuningEvaluation, item.evaluation)
            return types.TuningEvent(**base, kind="evaluation", evaluation=evaluation)
        case "checkpoint_step":
            return types.TuningEvent(**base, kind="checkpoint", checkpoint_step=item.checkpoint_step)
        case "message":
            return types.TuningEvent(**base, kind="message", message=item.message)
        case _:
            return types.TuningEvent(**base, kind="unknown")
