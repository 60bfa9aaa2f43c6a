"""Errors: the tree, and how messages name arguments."""

from __future__ import annotations

import grpc
import pytest
from tests.clients.scripted_server import ScriptedServer, fail

import graftwork
from graftwork import errors


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
