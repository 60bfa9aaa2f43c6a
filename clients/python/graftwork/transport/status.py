"""Turns what gRPC says about a failed call into the exceptions of errors.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from graftwork.errors import BY_CODE, APIError, FieldViolation, UnknownError
from graftwork.transport.request_ids import REQUEST_ID_KEY

_BROKEN_OFF = "CANCELLED"
"""gRPC's own words for a call that reached a server in the moment when it closed its port, and that nobody will answer.
Who cancelled a call here reads other words; ours carry a reason."""
_DETAILS_KEY = "grpc-status-details-bin"


def api_error(error: grpc.RpcError, request_id: str) -> APIError:
    """The exception for a failed call.

    error: from a synchronous or an asyncio call; both answer code(), details() and trailing_metadata().
    request_id: the id that the client sent, used where the server did not answer with one.
    """
    code = error.code()
    name = code.name if code is not None else "UNKNOWN"
    if name == "CANCELLED" and error.details() == _BROKEN_OFF:
        name = "UNAVAILABLE"
    trailing = _pairs(error.trailing_metadata())
    fields = _details(trailing)
    return BY_CODE.get(name, UnknownError)(
        error.details() or name.lower().replace("_", " "),
        code=name,
        request_id=str(dict(trailing).get(REQUEST_ID_KEY) or request_id),
        **fields,
    )


def _pairs(metadata: Iterable[Any] | None) -> list[tuple[str, str | bytes]]:
    return [(key, value) for key, value in metadata or ()]


def _details(trailing: list[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Reason, metadata, field violations and retry delay of a google.rpc.Status, as far as they are given.

    grpc_status.rpc_status would refuse a status whose message differs from the call's; a proxy that rewords the
    message must not cost us the reason, so the trailer is read here.
    """
    fields: dict[str, Any] = {}
    for raw in (value for key, value in trailing if key == _DETAILS_KEY and isinstance(value, bytes)):
        try:
            status = status_pb2.Status.FromString(raw)
        except DecodeError:
            continue
        for detail in status.details:
            _read_detail(detail, fields)
    return fields


def _read_detail(detail: Any, fields: dict[str, Any]) -> None:
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    try:
        if detail.Unpack(info):
            fields["reason"] = info.reason
            fields["metadata"] = dict(info.metadata)
        elif detail.Unpack(bad_request):
            fields["field_violations"] = [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
        elif detail.Unpack(retry):
            fields["retry_after_ms"] = retry.retry_delay.ToMilliseconds()
    except DecodeError:
        # A detail we cannot read must not hide the error itself.
        return
