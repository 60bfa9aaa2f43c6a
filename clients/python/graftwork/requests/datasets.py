"""Calls of TuningService about data sets."""

from __future__ import annotations

from collections.abc import Iterator

from graftwork import types
from graftwork.requests.fields import build
from graftwork.requests.names import dataset_name
from graftwork.responses import datasets as responses
from graftwork.transport.calls import Message, Page, Unary, Upload
from graftwork.transport.uploads import DatasetSource
from graftwork.v1 import tuning_pb2 as pb

_SERVICE = "/graftwork.v1.TuningService/"


def upload_dataset(source: DatasetSource, display_name: str | None) -> Upload[pb.UploadDatasetResponse, types.Dataset]:
    """UploadDataset. Repeating it is safe: the same bytes are stored once."""

    def messages() -> Iterator[Message]:
        name = source.display_name if display_name is None else display_name
        upload = build(pb.DatasetUpload, display_name=name, size_bytes=source.size_bytes)
        yield pb.UploadDatasetRequest(upload=upload)
        for data in source.chunks():
            yield pb.UploadDatasetRequest(data=data)

    return Upload(_SERVICE + "UploadDataset", messages, pb.UploadDatasetResponse, responses.dataset)


def get_dataset(dataset: str | types.Dataset) -> Unary[pb.GetDatasetResponse, types.Dataset]:
    """GetDataset."""
    request = build(pb.GetDatasetRequest, name=dataset_name(dataset))
    return Unary(_SERVICE + "GetDataset", request, pb.GetDatasetResponse, responses.dataset, retry=True)


def list_datasets(page_size: int, token: str) -> Unary[pb.ListDatasetsResponse, Page[types.Dataset]]:
    """ListDatasets, one page."""
    request = build(pb.ListDatasetsRequest, page_size=page_size, page_token=token)
    return Unary(_SERVICE + "ListDatasets", request, pb.ListDatasetsResponse, responses.dataset_page, retry=True)


def delete_dataset(dataset: str | types.Dataset) -> Unary[pb.DeleteDatasetResponse, None]:
    """DeleteDataset."""
    request = build(pb.DeleteDatasetRequest, name=dataset_name(dataset))
    return Unary(_SERVICE + "DeleteDataset", request, pb.DeleteDatasetResponse, lambda message: None, retry=False)


def validate_dataset(
    source: DatasetSource | None, dataset: str | types.Dataset | None, max_sequence_tokens: int
) -> Upload[pb.ValidateDatasetResponse, types.DatasetReport]:
    """ValidateDataset, of bytes sent along or of a stored data set. Raises ValueError unless exactly one is given."""
    if (source is None) == (dataset is None):
        raise ValueError("give either a source to send or dataset= to name a stored data set")
    name = "" if dataset is None else dataset_name(dataset)

    def messages() -> Iterator[Message]:
        check = build(pb.DatasetCheck, dataset=name, max_sequence_tokens=max_sequence_tokens)
        yield pb.ValidateDatasetRequest(check=check)
        for data in source.chunks() if source else ():
            yield pb.ValidateDatasetRequest(data=data)

    return Upload(_SERVICE + "ValidateDataset", messages, pb.ValidateDatasetResponse, responses.dataset_report)
