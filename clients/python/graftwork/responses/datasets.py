"""Answers of TuningService about data sets."""

from __future__ import annotations

from collections.abc import Mapping

from graftwork import types
from graftwork.responses.fields import from_message, time
from graftwork.transport.calls import Page
from graftwork.v1 import tuning_pb2 as pb

_FORMS: Mapping[int, types.DatasetForm] = {
    pb.DATASET_FORMAT_CHAT: "chat",
    pb.DATASET_FORMAT_PROMPT_COMPLETION: "prompt_completion",
    pb.DATASET_FORMAT_INSTRUCTION: "instruction",
    pb.DATASET_FORMAT_TEXT: "text",
}


def dataset(message: pb.UploadDatasetResponse | pb.GetDatasetResponse) -> types.Dataset:
    """A stored data set."""
    return _dataset(message.dataset)


def dataset_page(message: pb.ListDatasetsResponse) -> Page[types.Dataset]:
    """One page of data sets."""
    return Page(tuple(_dataset(item) for item in message.datasets), message.next_page_token)


def _dataset(data: pb.Dataset) -> types.Dataset:
    form = _FORMS.get(data.format, "unspecified")
    return from_message(types.Dataset, data, format=form, create_time=time(data, "create_time"))


def dataset_report(message: pb.ValidateDatasetResponse) -> types.DatasetReport:
    """What a check of a data set found."""
    return from_message(
        types.DatasetReport,
        message,
        format=_FORMS.get(message.format, "unspecified"),
        errors=tuple(from_message(types.LineError, error) for error in message.errors),
        more_errors=tuple(from_message(types.LineErrorKind, kind) for kind in message.more_errors),
        warnings=tuple(message.warnings),
    )
