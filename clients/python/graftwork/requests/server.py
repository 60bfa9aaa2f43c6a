"""Calls of ServerService."""

from __future__ import annotations

from graftwork import types
from graftwork.responses import server as responses
from graftwork.transport.calls import Unary
from graftwork.v1 import server_pb2 as pb

_SERVICE = "/graftwork.v1.ServerService/"


def get_server() -> Unary[pb.GetServerResponse, types.ServerInfo]:
    """GetServer."""
    request = pb.GetServerRequest()
    return Unary(_SERVICE + "GetServer", request, pb.GetServerResponse, responses.server, retry=True)
