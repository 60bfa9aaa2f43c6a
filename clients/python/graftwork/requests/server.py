"""Calls of ServerService."""

from __future__ import annotations

from graftwork import types
from graftwork.responses import server as responses
from graftwork.transport.calls import Unary
from graftwork.v1 import server_pb2

_SERVICE = "/graftwork.v1.ServerService/"


def get_server() -> Unary[server_pb2.GetServerResponse, types.ServerInfo]:
    """GetServer."""
    return Unary(
        path=_SERVICE + "GetServer",
        request=server_pb2.GetServerRequest(),
        response=server_pb2.GetServerResponse,
        parse=responses.server,
        retry=True,
    )
