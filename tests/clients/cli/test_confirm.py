"""What is asked before something is deleted."""

from __future__ import annotations

import signal
from typing import Any

import grpc
import pytest
from tests.clients.cli.running import on_terminal
from tests.clients.protos import adapter
from tests.clients.scripted_server import ScriptedServer, fail

from graftwork.v1 import adapters_pb2 as a


@pytest.mark.parametrize(
    ("command", "asked", "deletes"),
    [
        (("adapter", "delete", "dates"), "GetAdapter", "DeleteAdapter"),
        (("adapter", "delete", "dates@7"), "GetAdapter", "DeleteVersion"),
        (("dataset", "delete", "ds-1"), "GetDataset", "DeleteDataset"),
        (("tune", "delete", "j1"), "GetTuningJob", "DeleteTuningJob"),
    ],
)
def test_what_is_not_there_is_said_before_the_question(
    server: ScriptedServer, run: Any, command: tuple[str, ...], asked: str, deletes: str
) -> None:
    server.on(asked, fail(grpc.StatusCode.NOT_FOUND, "there is no such thing"))
    assert "there is no such thing" in run(*command, code=4).stderr
    assert server.requests(deletes) == []


@pytest.mark.parametrize(
    ("answer", "code", "sent"), [("y", 0, 1), ("YES", 0, 1), ("", 1, 0), ("no", 1, 0), (signal.SIGINT, 130, 0)]
)
def test_deleting_asks_on_a_terminal(
    server: ScriptedServer, answer: str | signal.Signals, code: int, sent: int
) -> None:
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter()))
    server.on("DeleteAdapter", a.DeleteAdapterResponse(deleted_versions=2))
    shown, ended = on_terminal(server, "adapter", "delete", "dates", turns=[answer], prompt=b"[y/N] ")
    assert "delete adapter dates with all its versions? [y/N] " in shown
    assert ended == code
    assert len(server.requests("DeleteAdapter")) == sent
    assert ("deleted dates (2 versions)" in shown) == bool(sent)


def test_deleting_with_yes_asks_nothing(server: ScriptedServer) -> None:
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter()))
    server.on("DeleteAdapter", a.DeleteAdapterResponse(deleted_versions=2))
    shown, code = on_terminal(server, "adapter", "delete", "dates", "--yes")
    assert (shown.strip(), code) == ("deleted dates (2 versions)", 0)
