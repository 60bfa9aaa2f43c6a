"""Calls of TuningService about jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2

from graftwork import types
from graftwork.requests.fields import build
from graftwork.requests.names import dataset_name, resource_name
from graftwork.responses import tuning as responses
from graftwork.transport.calls import Page, Streaming, Unary
from graftwork.transport.request_ids import new_request_id
from graftwork.v1 import tuning_pb2

_SERVICE = "/graftwork.v1.TuningService/"


def create_job(
    *,
    strategy: str,
    dataset: str | types.Dataset | None,
    adapter: str,
    config: Mapping[str, Any] | None = None,
    validation: str | types.Dataset | None = None,
    validation_fraction: float | None = None,
    load: bool = False,
    new_version: bool = False,
    request_id: str | None = None,
    validate_only: bool = False,
) -> Unary[tuning_pb2.CreateTuningJobResponse, types.TuningJobInfo]:
    """CreateTuningJob; with validate_only, dataset may be None. Raises ValueError for a config that is not JSON."""
    spec = build(
        tuning_pb2.TuningJobSpec,
        {"adapter_id": "adapter"},
        strategy=strategy,
        dataset=dataset_name(dataset) if dataset is not None else "",
        validation_dataset=dataset_name(validation, "validation") if validation is not None else "",
        validation_fraction=validation_fraction,
        adapter_id=adapter,
        config=_struct(config or {}),
        load=load,
        new_version=new_version,
    )
    return Unary(
        path=_SERVICE + "CreateTuningJob",
        # Made here, once: every attempt of this call carries the same id, so a retry cannot start a second job.
        request=build(
            tuning_pb2.CreateTuningJobRequest,
            spec=spec,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        ),
        response=tuning_pb2.CreateTuningJobResponse,
        parse=responses.job_of,
        retry=True,
    )


def _struct(config: Mapping[str, Any]) -> struct_pb2.Struct:
    settings = struct_pb2.Struct()
    for key, value in config.items():
        try:
            settings.update({key: value})
        except (TypeError, ValueError):
            raise ValueError(f"config[{key!r}] is {value!r:.60}; a JSON value is accepted") from None
    return settings


def get_job(job: str) -> Unary[tuning_pb2.GetTuningJobResponse, types.TuningJobInfo]:
    """GetTuningJob, by id or resource name."""
    return Unary(
        path=_SERVICE + "GetTuningJob",
        request=build(tuning_pb2.GetTuningJobRequest, name=resource_name("tuningJobs", job)),
        response=tuning_pb2.GetTuningJobResponse,
        parse=responses.job_of,
        retry=True,
    )


def list_jobs(page_size: int, token: str) -> Unary[tuning_pb2.ListTuningJobsResponse, Page[types.TuningJobInfo]]:
    """ListTuningJobs, one page."""
    return Unary(
        path=_SERVICE + "ListTuningJobs",
        request=build(tuning_pb2.ListTuningJobsRequest, page_size=page_size, page_token=token),
        response=tuning_pb2.ListTuningJobsResponse,
        parse=responses.job_page,
        retry=True,
    )


def cancel_job(job: str) -> Unary[tuning_pb2.CancelTuningJobResponse, types.TuningJobInfo]:
    """CancelTuningJob, by id or resource name."""
    return Unary(
        path=_SERVICE + "CancelTuningJob",
        request=build(tuning_pb2.CancelTuningJobRequest, name=resource_name("tuningJobs", job)),
        response=tuning_pb2.CancelTuningJobResponse,
        parse=responses.job_of,
        retry=False,
    )


def delete_job(job: str) -> Unary[tuning_pb2.DeleteTuningJobResponse, None]:
    """DeleteTuningJob, by id or resource name."""
    return Unary(
        path=_SERVICE + "DeleteTuningJob",
        request=build(tuning_pb2.DeleteTuningJobRequest, name=resource_name("tuningJobs", job)),
        response=tuning_pb2.DeleteTuningJobResponse,
        parse=lambda message: None,
        retry=False,
    )


def watch_job(job: str, after_sequence: int) -> Streaming[tuning_pb2.WatchTuningJobResponse, types.TuningEvent]:
    """WatchTuningJob from after an event on."""
    return Streaming(
        path=_SERVICE + "WatchTuningJob",
        request=build(
            tuning_pb2.WatchTuningJobRequest, name=resource_name("tuningJobs", job), after_sequence=after_sequence
        ),
        response=tuning_pb2.WatchTuningJobResponse,
        parse=responses.event,
    )
