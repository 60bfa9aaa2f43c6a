"""What a failed call says: reason, metadata, violations and request id."""

from __future__ import annotations

import grpc
import pytest
from tests.clients.scripted_server import ScriptedServer, fail

import graftwork
from graftwork.v1 import adapters_pb2 as a


def test_details_are_read(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on(
        "GetAdapter",
        fail(
            grpc.StatusCode.INVALID_ARGUMENT,
            "bad name",
            reason="BAD_NAME",
            metadata={"name": "../x"},
            violations={"name": "expected letters"},
            request_id="from-the-server",
        ),
    )
    with pytest.raises(graftwork.InvalidArgumentError) as caught:
        client.adapters.get("../x")
    error = caught.value
    assert error.reason == "BAD_NAME"
    assert error.metadata == {"name": "../x"}
    assert error.field_violations == (graftwork.FieldViolation("name", "expected letters"),)
    assert error.request_id == "from-the-server"
    assert error.retry_after_ms is None
    text = str(error)
    assert text == "bad name [INVALID_ARGUMENT, reason BAD_NAME, request from-the-server]; name: expected letters"


async def test_details_are_read_by_the_async_client(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    step = fail(grpc.StatusCode.NOT_FOUND, "no x", reason="ADAPTER_NOT_FOUND", request_id="r")
    server.on("GetAdapter", step)
    server.on("Generate", step)
    with pytest.raises(graftwork.NotFoundError) as caught:
        await aclient.adapters.get("x")
    assert (caught.value.reason, caught.value.request_id) == ("ADAPTER_NOT_FOUND", "r")
    with pytest.raises(graftwork.NotFoundError) as caught:
        await aclient.generate("x", "hi")
    assert (caught.value.reason, caught.value.request_id) == ("ADAPTER_NOT_FOUND", "r")


def test_own_request_id_when_nothing_answers() -> None:
    with (
        graftwork.Client(address="127.0.0.1:1", max_retries=0) as client,
        pytest.raises(graftwork.UnavailableError) as caught,
    ):
        client.adapters.get("x")
    assert len(caught.value.request_id) == 32


def test_request_id_is_the_one_that_was_sent(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("GetAdapter", fail(grpc.StatusCode.NOT_FOUND))
    with pytest.raises(graftwork.NotFoundError) as caught:
        client.adapters.get("x")
    assert caught.value.request_id == server.seen[0].metadata["x-request-id"]


def test_damaged_details_do_not_hide_the_error(server: ScriptedServer, client: graftwork.Client) -> None:
    def damaged(request: a.GetAdapterRequest, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "no x")

    server.on("GetAdapter", damaged)
    with pytest.raises(graftwork.NotFoundError, match="no x"):
        client.adapters.get("x")
