"""Answers of ServerService."""

from __future__ import annotations

from graftwork import types
from graftwork.responses.fields import from_message, time
from graftwork.responses.tuning import job
from graftwork.v1 import server_pb2 as pb


def server(message: pb.GetServerResponse) -> types.ServerInfo:
    """A server."""
    found = message.server
    return from_message(
        types.ServerInfo,
        found,
        versions=dict(found.versions),
        start_time=time(found, "start_time"),
        base_model=from_message(types.BaseModelInfo, found.base_model),
        limits=from_message(types.ServerLimits, found.limits),
        loaded_versions=tuple(found.loaded_versions),
        jobs=tuple(job(item) for item in found.jobs),
    )
