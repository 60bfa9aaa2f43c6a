"""Calls of TuningService about data sets."""

from __future__ import annotations

from collections.abc import Iterator

from graftwork import types
from graftwork.requests.fields import build
from graftwork.requests.names import dataset_name
from graftwork.responses import datasets as responses
from graftwork.transport.calls import Message, Page, Unary, Upload
from graftwork.transport.uploads import DatasetSource
from graftwork.v1 import tuning_pb2

_SERVICE = "/graftwork.v1.TuningService/"


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
        path=_SERVICE + "UploadDataset",
        messages=messages,
        response=tuning_pb2.UploadDatasetResponse,
        parse=responses.dataset,
    )


def get_dataset(dataset: str | types.Dataset) -> Unary[tuning_pb2.GetDatasetResponse, types.Dataset]:
    """GetDataset."""
    return Unary(
        path=_SERVICE + "GetDataset",
        request=build(tuning_pb2.GetDatasetRequest, name=dataset_name(dataset)),
        response=tuning_pb2.GetDatasetResponse,
        parse=responses.dataset,
        retry=True,
    )


def list_datasets(page_size: int, token: str) -> Unary[tuning_pb2.ListDatasetsResponse, Page[types.Dataset]]:
    """ListDatasets, one page."""
    return Unary(
        path=_SERVICE + "ListDatasets",
        request=build(tuning_pb2.ListDatasetsRequest, page_size=page_size, page_token=token),
        response=tuning_pb2.ListDatasetsResponse,
        parse=responses.dataset_page,
        retry=True,
    )


def delete_dataset(dataset: str | types.Dataset) -> Unary[tuning_pb2.DeleteDatasetResponse, None]:
    """DeleteDataset."""
    return Unary(
        path=_SERVICE + "DeleteDataset",
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
        path=_SERVICE + "ValidateDataset",
        messages=messages,
        response=tuning_pb2.ValidateDatasetResponse,
        parse=responses.dataset_report,
    )
