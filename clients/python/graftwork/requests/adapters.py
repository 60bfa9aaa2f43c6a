"""Calls of AdapterService."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from graftwork import types
from graftwork.requests.fields import build
from graftwork.requests.names import adapter_name, whole_adapter_name
from graftwork.responses import adapters as responses
from graftwork.transport.calls import Message, Page, Unary, Upload
from graftwork.transport.request_ids import new_request_id
from graftwork.transport.uploads import AdapterFiles
from graftwork.v1 import adapters_pb2 as pb

_SERVICE = "/graftwork.v1.AdapterService/"


def create_adapter(
    files: AdapterFiles,
    *,
    adapter_id: str,
    strategy: str | None,
    new_version: bool,
    load: bool,
    request_id: str | None,
) -> Upload[pb.CreateAdapterResponse, types.Adapter]:
    """CreateAdapter. The request_id is made here, once, so that a retry cannot publish a second version."""
    upload = build(
        pb.AdapterUpload,
        adapter_id=adapter_id,
        strategy=strategy or "",
        files=[pb.FileInfo(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in files.files],
        new_version=new_version,
        load=load,
        request_id=request_id or new_request_id(),
    )

    def messages() -> Iterator[Message]:
        yield pb.CreateAdapterRequest(upload=upload)
        for name, data in files.chunks():
            yield pb.CreateAdapterRequest(chunk=pb.FileChunk(name=name, data=data))

    return Upload(_SERVICE + "CreateAdapter", messages, pb.CreateAdapterResponse, responses.loaded_adapter)


def get_adapter(adapter: str | types.Adapter) -> Unary[pb.GetAdapterResponse, types.Adapter]:
    """GetAdapter."""
    request = build(pb.GetAdapterRequest, name=adapter_name(adapter))
    return Unary(_SERVICE + "GetAdapter", request, pb.GetAdapterResponse, responses.adapter, retry=True)


def list_adapters(page_size: int, token: str) -> Unary[pb.ListAdaptersResponse, Page[types.Adapter]]:
    """ListAdapters, one page."""
    request = build(pb.ListAdaptersRequest, page_size=page_size, page_token=token)
    return Unary(_SERVICE + "ListAdapters", request, pb.ListAdaptersResponse, responses.adapter_page, retry=True)


def list_versions(
    adapter: str | types.Adapter, page_size: int, token: str
) -> Unary[pb.ListVersionsResponse, Page[types.Adapter]]:
    """ListVersions, one page. Raises ValueError for a single version."""
    parent = whole_adapter_name(adapter)
    request = build(pb.ListVersionsRequest, parent=parent, page_size=page_size, page_token=token)
    return Unary(_SERVICE + "ListVersions", request, pb.ListVersionsResponse, responses.version_page, retry=True)


def delete_adapter(adapter: str | types.Adapter) -> Unary[pb.DeleteAdapterResponse, int]:
    """DeleteAdapter, of an id or an Adapter."""
    adapter_id = adapter.adapter_id if isinstance(adapter, types.Adapter) else adapter
    request = build(pb.DeleteAdapterRequest, name=adapter_name(adapter_id))
    return Unary(_SERVICE + "DeleteAdapter", request, pb.DeleteAdapterResponse, responses.deleted_versions, retry=False)


def delete_version(adapter: str) -> Unary[pb.DeleteVersionResponse, int]:
    """DeleteVersion, of "id@version". Parsed to how many were deleted, which is one."""
    request = build(pb.DeleteVersionRequest, name=adapter_name(adapter))
    return Unary(_SERVICE + "DeleteVersion", request, pb.DeleteVersionResponse, lambda message: 1, retry=False)


def delete(adapter: str | types.Adapter) -> Unary[Any, int]:
    """DeleteVersion of "id@version", else DeleteAdapter. Raises ValueError for "id@latest": that moves."""
    if isinstance(adapter, types.Adapter) or ("@" not in adapter and "/versions/" not in adapter):
        return delete_adapter(adapter)
    if adapter.endswith(("@latest", "/latest")):
        raise ValueError(f"{adapter!r}: name the version to delete by its number, such as dates@3")
    return delete_version(adapter)


def load_adapter(adapter: str | types.Adapter) -> Unary[pb.LoadAdapterResponse, types.Adapter]:
    """LoadAdapter."""
    request = build(pb.LoadAdapterRequest, name=adapter_name(adapter))
    return Unary(_SERVICE + "LoadAdapter", request, pb.LoadAdapterResponse, responses.loaded_adapter, retry=True)


def unload_adapter(adapter: str | types.Adapter) -> Unary[pb.UnloadAdapterResponse, types.Adapter]:
    """UnloadAdapter."""
    request = build(pb.UnloadAdapterRequest, name=adapter_name(adapter))
    return Unary(_SERVICE + "UnloadAdapter", request, pb.UnloadAdapterResponse, responses.unloaded_adapter, retry=True)


def pin_adapter(adapter: str | types.Adapter) -> Unary[pb.PinAdapterResponse, types.Adapter]:
    """PinAdapter."""
    request = build(pb.PinAdapterRequest, name=adapter_name(adapter))
    return Unary(_SERVICE + "PinAdapter", request, pb.PinAdapterResponse, responses.loaded_adapter, retry=True)


def unpin_adapter(adapter: str | types.Adapter) -> Unary[pb.UnpinAdapterResponse, types.Adapter]:
    """UnpinAdapter."""
    request = build(pb.UnpinAdapterRequest, name=adapter_name(adapter))
    return Unary(_SERVICE + "UnpinAdapter", request, pb.UnpinAdapterResponse, responses.adapter, retry=True)
