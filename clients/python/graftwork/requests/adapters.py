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
from graftwork.v1 import adapters_pb2

_SERVICE = "/graftwork.v1.AdapterService/"


def create_adapter(
    files: AdapterFiles,
    *,
    adapter_id: str,
    strategy: str | None,
    new_version: bool,
    load: bool,
    request_id: str | None,
) -> Upload[adapters_pb2.CreateAdapterResponse, types.Adapter]:
    """CreateAdapter. The request_id is made here, once, so that a retry cannot publish a second version."""
    upload = build(
        adapters_pb2.AdapterUpload,
        adapter_id=adapter_id,
        strategy=strategy or "",
        files=[
            adapters_pb2.FileInfo(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in files.files
        ],
        new_version=new_version,
        load=load,
        request_id=request_id or new_request_id(),
    )

    def messages() -> Iterator[Message]:
        yield adapters_pb2.CreateAdapterRequest(upload=upload)
        for name, data in files.chunks():
            yield adapters_pb2.CreateAdapterRequest(chunk=adapters_pb2.FileChunk(name=name, data=data))

    return Upload(
        path=_SERVICE + "CreateAdapter",
        messages=messages,
        response=adapters_pb2.CreateAdapterResponse,
        parse=responses.loaded_adapter,
    )


def get_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.GetAdapterResponse, types.Adapter]:
    """GetAdapter."""
    return Unary(
        path=_SERVICE + "GetAdapter",
        request=build(adapters_pb2.GetAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.GetAdapterResponse,
        parse=responses.adapter,
        retry=True,
    )


def list_adapters(page_size: int, token: str) -> Unary[adapters_pb2.ListAdaptersResponse, Page[types.Adapter]]:
    """ListAdapters, one page."""
    return Unary(
        path=_SERVICE + "ListAdapters",
        request=build(adapters_pb2.ListAdaptersRequest, page_size=page_size, page_token=token),
        response=adapters_pb2.ListAdaptersResponse,
        parse=responses.adapter_page,
        retry=True,
    )


def list_versions(
    adapter: str | types.Adapter, page_size: int, token: str
) -> Unary[adapters_pb2.ListVersionsResponse, Page[types.Adapter]]:
    """ListVersions, one page. Raises ValueError for a single version."""
    return Unary(
        path=_SERVICE + "ListVersions",
        request=build(
            adapters_pb2.ListVersionsRequest,
            parent=whole_adapter_name(adapter),
            page_size=page_size,
            page_token=token,
        ),
        response=adapters_pb2.ListVersionsResponse,
        parse=responses.version_page,
        retry=True,
    )


def delete_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.DeleteAdapterResponse, int]:
    """DeleteAdapter, of an id or an Adapter."""
    adapter_id = adapter.adapter_id if isinstance(adapter, types.Adapter) else adapter
    return Unary(
        path=_SERVICE + "DeleteAdapter",
        request=build(adapters_pb2.DeleteAdapterRequest, name=adapter_name(adapter_id)),
        response=adapters_pb2.DeleteAdapterResponse,
        parse=lambda message: message.deleted_versions,
        retry=False,
    )


def delete_version(adapter: str) -> Unary[adapters_pb2.DeleteVersionResponse, int]:
    """DeleteVersion, of "id@version". Parsed to how many were deleted, which is one."""
    return Unary(
        path=_SERVICE + "DeleteVersion",
        request=build(adapters_pb2.DeleteVersionRequest, name=adapter_name(adapter)),
        response=adapters_pb2.DeleteVersionResponse,
        parse=lambda message: 1,
        retry=False,
    )


def delete(adapter: str | types.Adapter) -> Unary[Any, int]:
    """DeleteVersion of "id@version", else DeleteAdapter. Raises ValueError for "id@latest": that moves."""
    if isinstance(adapter, types.Adapter) or ("@" not in adapter and "/versions/" not in adapter):
        return delete_adapter(adapter)
    if adapter.endswith(("@latest", "/latest")):
        raise ValueError(f"{adapter!r}: name the version to delete by its number, such as dates@3")
    return delete_version(adapter)


def load_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.LoadAdapterResponse, types.Adapter]:
    """LoadAdapter."""
    return Unary(
        path=_SERVICE + "LoadAdapter",
        request=build(adapters_pb2.LoadAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.LoadAdapterResponse,
        parse=responses.loaded_adapter,
        retry=True,
    )


def unload_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.UnloadAdapterResponse, types.Adapter]:
    """UnloadAdapter."""
    return Unary(
        path=_SERVICE + "UnloadAdapter",
        request=build(adapters_pb2.UnloadAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.UnloadAdapterResponse,
        parse=responses.unloaded_adapter,
        retry=True,
    )


def pin_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.PinAdapterResponse, types.Adapter]:
    """PinAdapter."""
    return Unary(
        path=_SERVICE + "PinAdapter",
        request=build(adapters_pb2.PinAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.PinAdapterResponse,
        parse=responses.loaded_adapter,
        retry=True,
    )


def unpin_adapter(adapter: str | types.Adapter) -> Unary[adapters_pb2.UnpinAdapterResponse, types.Adapter]:
    """UnpinAdapter."""
    return Unary(
        path=_SERVICE + "UnpinAdapter",
        request=build(adapters_pb2.UnpinAdapterRequest, name=adapter_name(adapter)),
        response=adapters_pb2.UnpinAdapterResponse,
        parse=responses.adapter,
        retry=True,
    )
