"""Lists that page by themselves."""

from __future__ import annotations

import grpc
import pytest
from tests.clients.protos import adapter
from tests.clients.scripted_server import ScriptedServer

import graftwork
from graftwork.v1 import adapters_pb2 as a


def pages(request: a.ListAdaptersRequest, context: grpc.ServicerContext) -> a.ListAdaptersResponse:
    start = int(request.page_token or 0)
    items = [adapter(f"a{number}") for number in range(start, min(start + 2, 5))]
    return a.ListAdaptersResponse(adapters=items, next_page_token=str(start + 2) if start + 2 < 5 else "")


async def test_lists_page_by_themselves(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    server.on("ListAdapters", pages)
    expected = [f"a{number}" for number in range(5)]
    assert [item.adapter_id for item in client.adapters.list(page_size=2)] == expected
    assert [(r.page_size, r.page_token) for r in server.requests("ListAdapters")] == [(2, ""), (2, "2"), (2, "4")]
    assert [item.adapter_id async for item in aclient.adapters.list()] == expected


async def test_versions_page_by_themselves(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    def versions(request: a.ListVersionsRequest, context: grpc.ServicerContext) -> a.ListVersionsResponse:
        number = int(request.page_token or 3)
        return a.ListVersionsResponse(versions=[adapter(version=number)], next_page_token=str(number - 1 or ""))

    server.on("ListVersions", versions)
    assert [item.version for item in client.adapters.versions("dates")] == [3, 2, 1]
    assert [item.version async for item in aclient.adapters.versions("adapters/dates", page_size=1)] == [3, 2, 1]
    assert [(r.parent, r.page_size) for r in server.requests("ListVersions")] == [("adapters/dates", 0)] * 3 + [
        ("adapters/dates", 1)
    ] * 3
    with pytest.raises(ValueError, match="without a version"):
        list(client.adapters.versions("dates@1"))


def test_lists_fetch_no_page_too_many(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("ListAdapters", pages)
    items = client.adapters.list()
    assert server.seen == []
    assert [next(items).adapter_id, next(items).adapter_id] == ["a0", "a1"]
    assert len(server.seen) == 1
