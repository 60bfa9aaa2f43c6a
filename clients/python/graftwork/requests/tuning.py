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
from graftwork.v1 import tuning_pb2 as pb

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
) -> Unary[pb.CreateTuningJobResponse, types.TuningJobInfo]:
    """CreateTuningJob; with validate_only, dataset may be None. Raises ValueError for a config that is not JSON."""
    settings = _struct(config or {})
    spec = build(
        pb.TuningJobSpec,
        {"adapter_id": "adapter"},
        strategy=strategy,
        dataset=dataset_name(dataset) if dataset is not None else "",
        validation_dataset=dataset_name(validation, "validation") if validation is not None else "",
        validation_fraction=validation_fraction,
        adapter_id=adapter,
        config=settings,
        load=load,
        new_version=new_version,
    )
    # The id is made here, once: every attempt of this call carries the same, so a retry cannot start a second job.
    request_id = request_id or new_request_id()
    request = build(pb.CreateTuningJobRequest, spec=spec, request_id=request_id, validate_only=validate_only)
    return Unary(_SERVICE + "CreateTuningJob", request, pb.CreateTuningJobResponse, responses.job_of, retry=True)


def _struct(config: Mapping[str, Any]) -> struct_pb2.Struct:
    settings = struct_pb2.Struct()
    for key, value in config.items():
        try:
            settings.update({key: value})
        except (TypeError, ValueError):
            raise ValueError(f"config[{key!r}] is {value!r:.60}; a JSON value is accepted") from None
    return settings


def get_job(job: str) -> Unary[pb.GetTuningJobResponse, types.TuningJobInfo]:
    """GetTuningJob, by id or resource name."""
    request = build(pb.GetTuningJobRequest, name=resource_name("tuningJobs", job))
    return Unary(_SERVICE + "GetTuningJob", request, pb.GetTuningJobResponse, responses.job_of, retry=True)


def list_jobs(page_size: int, token: str) -> Unary[pb.ListTuningJobsResponse, Page[types.TuningJobInfo]]:
    """ListTuningJobs, one page."""
    request = build(pb.ListTuningJobsRequest, page_size=page_size, page_token=token)
    return Unary(_SERVICE + "ListTuningJobs", request, pb.ListTuningJobsResponse, responses.job_page, retry=True)


def cancel_job(job: str) -> Unary[pb.CancelTuningJobResponse, types.TuningJobInfo]:
    """CancelTuningJob, by id or resource name."""
    request = build(pb.CancelTuningJobRequest, name=resource_name("tuningJobs", job))
    return Unary(_SERVICE + "CancelTuningJob", request, pb.CancelTuningJobResponse, responses.job_of, retry=False)


def delete_job(job: str) -> Unary[pb.DeleteTuningJobResponse, None]:
    """DeleteTuningJob, by id or resource name."""
    request = build(pb.DeleteTuningJobRequest, name=resource_name("tuningJobs", job))
    return Unary(_SERVICE + "DeleteTuningJob", request, pb.DeleteTuningJobResponse, lambda message: None, retry=False)


def watch_job(job: str, after_sequence: int) -> Streaming[pb.WatchTuningJobResponse, types.TuningEvent]:
    """WatchTuningJob from after an event on."""
    request = build(pb.WatchTuningJobRequest, name=resource_name("tuningJobs", job), after_sequence=after_sequence)
    return Streaming(_SERVICE + "WatchTuningJob", request, pb.WatchTuningJobResponse, responses.event)
