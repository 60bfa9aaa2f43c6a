"""What a failed call becomes: the class by code, and everything the server said about it."""

from __future__ import annotations

import re

import grpc
import pytest
from tests.clients.scripted_server import ScriptedServer, fail

import graftwork
from graftwork import errors
from graftwork.v1 import adapters_pb2 as a


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_each_code_has_its_class(server: ScriptedServer, code: grpc.StatusCode) -> None:
    server.on("GetAdapter", fail(code, "so it is"))
    with (
        graftwork.Client(address=server.address, max_retries=0) as client,
        pytest.raises(graftwork.APIError) as caught,
    ):
        client.adapters.get("x")
    assert type(caught.value) is errors.BY_CODE[code.name]
    assert caught.value.code == code.name
    assert caught.value.message == "so it is"


def test_docstring_shows_the_whole_tree() -> None:
    assert errors.__doc__ is not None
    for cls in [*errors.BY_CODE.values(), *graftwork.GraftworkError.__subclasses__()]:
        assert cls.__name__ in errors.__doc__


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


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout"):
        graftwork.Client(timeout=0)
    for address in ("foo", "127.0.0.1", "http://127.0.0.1:8470", "::1:8470", "host:port", "a b:1"):
        with pytest.raises(ValueError, match=f"address is '{re.escape(address)}'; HOST:PORT is accepted"):
            graftwork.Client(address=address)
    for address in ("localhost:1", "[::1]:8470", "unix:/tmp/socket", "dns:///host:1"):
        graftwork.Client(address=address).close()
    with pytest.raises(ValueError, match="max_retries"):
        graftwork.AsyncClient(max_retries=-1)


def test_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTWORK_ADDRESS", raising=False)
    assert graftwork.Client().address == "127.0.0.1:8470"
    monkeypatch.setenv("GRAFTWORK_ADDRESS", "10.0.0.1:99")
    assert graftwork.Client().address == "10.0.0.1:99"
    assert graftwork.Client(address="h:1").address == "h:1"


def test_messages_name_arguments_and_not_the_fields_of_requests(
    server: ScriptedServer, client: graftwork.Client
) -> None:
    violations = {"sampling.top_p": "is 3; (0, 1] is accepted", "spec.config.r": "is -1", "spec.adapter_id": "is bad"}
    server.on("Generate", fail(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p is 3", violations=violations))
    with pytest.raises(graftwork.InvalidArgumentError) as caught:
        client.generate("x", "hi")
    assert caught.value.message == "top_p is 3"
    assert [violation.field for violation in caught.value.field_violations] == list(violations)
    assert str(caught.value).endswith("top_p: is 3; (0, 1] is accepted; config.r: is -1; adapter: is bad")


def test_of_violations_with_one_description_the_message_tells_the_first(
    server: ScriptedServer, client: graftwork.Client
) -> None:
    violations = {"line 1": "is empty", "line 3": "is empty", "line 4": "is long"}
    server.on("Generate", fail(grpc.StatusCode.INVALID_ARGUMENT, "line 1: is empty", violations=violations))
    with pytest.raises(graftwork.InvalidArgumentError) as caught:
        client.generate("x", "hi")
    assert [violation.field for violation in caught.value.unsaid_violations] == ["line 3", "line 4"]
