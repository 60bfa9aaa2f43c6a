"""Answers of AdapterService."""

from __future__ import annotations

from graftwork import types
from graftwork.responses.fields import from_message, time
from graftwork.transport.calls import Page
from graftwork.v1 import adapters_pb2 as pb


def _adapter(
    message: pb.Adapter, *, load_report: types.LoadReport | None = None, unpinned: bool = False
) -> types.Adapter:
    create_time = time(message, "create_time")
    return from_message(types.Adapter, message, create_time=create_time, load_report=load_report, unpinned=unpinned)


def loaded_adapter(
    message: pb.CreateAdapterResponse | pb.LoadAdapterResponse | pb.PinAdapterResponse,
) -> types.Adapter:
    """An adapter with what its load bound, if it was loaded."""
    report = from_message(types.LoadReport, message.load_report) if message.HasField("load_report") else None
    return _adapter(message.adapter, load_report=report)


def adapter(message: pb.GetAdapterResponse | pb.UnpinAdapterResponse) -> types.Adapter:
    """An adapter."""
    return _adapter(message.adapter)


def unloaded_adapter(message: pb.UnloadAdapterResponse) -> types.Adapter:
    """An adapter, and whether its pin ended with it."""
    return _adapter(message.adapter, unpinned=message.unpinned)


def adapter_page(message: pb.ListAdaptersResponse) -> Page[types.Adapter]:
    """One page of adapters."""
    return Page(tuple(_adapter(item) for item in message.adapters), message.next_page_token)


def version_page(message: pb.ListVersionsResponse) -> Page[types.Adapter]:
    """One page of an adapter's versions."""
    return Page(tuple(_adapter(item) for item in message.versions), message.next_page_token)


def deleted_versions(message: pb.DeleteAdapterResponse) -> int:
    """How many versions were deleted."""
    return message.deleted_versions
