"""Arguments to calls, for data sets and tuning jobs; requests.py has the rest and the rule for retries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf import struct_pb2

from graftwork import responses, types
from graftwork.fields import build
from graftwork.requests import resource_name
from graftwork.transport.calls import Message, Page, Streaming, Unary, Upload
from graftwork.transport.request_ids import new_request_id
from graftwork.transport.uploads import DatasetSource
from graftwork.v1 import tuning_pb2

_TUNING = "/graftwork.v1.TuningService/"


def dataset_name(dataset: str | types.Dataset, called: str = "dataset") -> str:
    """The resource name of a Dataset, an id or a resource name. Raises TypeError for rows that were not uploaded."""
    if isinstance(dataset, types.Dataset):
        return dataset.name
    if not isinstance(dataset, str):
        raise TypeError(
            f"{called} is {dataset!r:.60}; a stored data set or its id is accepted: "
            "client.datasets.upload(...) returns one"
        )
    return resource_name("datasets", dataset)


def upload_dataset(
    source: DatasetSource, display_name: str | None
) -> Upload[tuning_pb2.UploadDatasetResponse, types.Dataset]:
    """UploadDataset. Repeating it is safe: the same bytes are stored once."""

    def messages() -> Iterator[Message]:
        name = source.display_name if display_name is None else display_name
        upload = build(tuning_pb2.DatasetUpload, display_name=name, size_bytes=source.size_bytes)
        yield tuning_pb2.UploadDatasetRequest(upload=upload)
        for data in source.chunks():
            yield tuning_pb2.UploadDatasetRequest(data=data)

    return Upload(
        path=_TUNING + "UploadDataset",
        messages=messages,
        response=tuning_pb2.UploadDatasetResponse,
        parse=responses.dataset,
    )


def get_dataset(dataset: str | types.Dataset) -> Unary[tuning_pb2.GetDatasetResponse, types.Dataset]:
    """GetDataset."""
    return Unary(
        path=_TUNING + "GetDataset",
        request=build(tuning_pb2.GetDatasetRequest, name=dataset_name(dataset)),
        response=tuning_pb2.GetDatasetResponse,
        parse=responses.dataset,
        retry=True,
    )


def list_datasets(page_size: int, token: str) -> Unary[tuning_pb2.ListDatasetsResponse, Page[types.Dataset]]:
    """ListDatasets, one page."""
    return Unary(
        path=_TUNING + "ListDatasets",
        request=build(tuning_pb2.ListDatasetsRequest, page_size=page_size, page_token=token),
        response=tuning_pb2.ListDatasetsResponse,
        parse=responses.dataset_page,
        retry=True,
    )


def delete_dataset(dataset: str | types.Dataset) -> Unary[tuning_pb2.DeleteDatasetResponse, None]:
    """DeleteDataset."""
    return Unary(
        path=_TUNING + "DeleteDataset",
        request=build(tuning_pb2.DeleteDatasetRequest, name=dataset_name(dataset)),
        response=tuning_pb2.DeleteDatasetResponse,
        parse=lambda message: None,
        retry=False,
    )


def validate_dataset(
    source: DatasetSource | None, dataset: str | types.Dataset | None, max_sequence_tokens: int
) -> Upload[tuning_pb2.ValidateDatasetResponse, types.DatasetReport]:
    """ValidateDataset, of bytes sent along or of a stored data set. Raises ValueError unless exactly one is given."""
    if (source is None) == (dataset is None):
        raise ValueError("give either a source to send or dataset= to name a stored data set")
    name = "" if dataset is None else dataset_name(dataset)

    def messages() -> Iterator[Message]:
        check = build(tuning_pb2.DatasetCheck, dataset=name, max_sequence_tokens=max_sequence_tokens)
        yield tuning_pb2.ValidateDatasetRequest(check=check)
        for data in source.chunks() if source else ():
            yield tuning_pb2.ValidateDatasetRequest(data=data)

    return Upload(
        path=_TUNING + "ValidateDataset",
        messages=messages,
        response=tuning_pb2.ValidateDatasetResponse,
        parse=responses.dataset_report,
    )


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
    settings = struct_pb2.Struct()
    for key, value in (config or {}).items():
        try:
            settings.update({key: value})
        except (TypeError, ValueError):
            raise ValueError(f"config[{key!r}] is {value!r:.60}; a JSON value is accepted") from None
    spec = build(
        tuning_pb2.TuningJobSpec,
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
    return Unary(
        path=_TUNING + "CreateTuningJob",
        # Made here, once: every attempt of this call carries the same id, so a retry cannot start a second job.
        request=build(
            tuning_pb2.CreateTuningJobRequest,
            spec=spec,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        ),
        response=tuning_pb2.CreateTuningJobResponse,
        parse=lambda message: responses.job(message.job),
        retry=True,
    )


def get_job(job: str) -> Unary[tuning_pb2.GetTuningJobResponse, types.TuningJobInfo]:
    """GetTuningJob, by id or resource name."""
    return Unary(
        path=_TUNING + "GetTuningJob",
        request=build(tuning_pb2.GetTuningJobRequest, name=resource_name("tuningJobs", job)),
        response=tuning_pb2.GetTuningJobResponse,
        parse=lambda message: responses.job(message.job),
        retry=True,
    )


def list_jobs(page_size: int, token: str) -> Unary[tuning_pb2.ListTuningJobsResponse, Page[types.TuningJobInfo]]:
    """ListTuningJobs, one page."""
    return Unary(
        path=_TUNING + "ListTuningJobs",
        request=build(tuning_pb2.ListTuningJobsRequest, page_size=page_size, page_token=token),
        response=tuning_pb2.ListTuningJobsResponse,
        parse=responses.job_page,
        retry=True,
    )


def cancel_job(job: str) -> Unary[tuning_pb2.CancelTuningJobResponse, types.TuningJobInfo]:
    """CancelTuningJob, by id or resource name."""
    return Unary(
        path=_TUNING + "CancelTuningJob",
        request=build(tuning_pb2.CancelTuningJobRequest, name=resource_name("tuningJobs", job)),
        response=tuning_pb2.CancelTuningJobResponse,
        parse=lambda message: responses.job(message.job),
        retry=False,
    )


def delete_job(job: str) -> Unary[tuning_pb2.DeleteTuningJobResponse, None]:
    """DeleteTuningJob, by id or resource name."""
    return Unary(
        path=_TUNING + "DeleteTuningJob",
        request=build(tuning_pb2.DeleteTuningJobRequest, name=resource_name("tuningJobs", job)),
        response=tuning_pb2.DeleteTuningJobResponse,
        parse=lambda message: None,
        retry=False,
    )


def watch_job(job: str, after_sequence: int) -> Streaming[tuning_pb2.WatchTuningJobResponse, types.TuningEvent]:
    """WatchTuningJob from after an event on."""
    return Streaming(
        path=_TUNING + "WatchTuningJob",
        request=build(
            tuning_pb2.WatchTuningJobRequest, name=resource_name("tuningJobs", job), after_sequence=after_sequence
        ),
        response=tuning_pb2.WatchTuningJobResponse,
        parse=responses.event,
    )
