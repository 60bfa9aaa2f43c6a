"""What the tests of the RPC layer share: a whole server in this process and the reading of its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import grpc
from google.rpc import error_details_pb2, status_pb2
from tests.server import scripted_engine as script

from graftwork.v1 import adapters_pb2_grpc, generation_pb2_grpc, server_pb2_grpc, strategies_pb2_grpc, tuning_pb2_grpc
from graftwork_server.config import ServerConfig
from graftwork_server.front.front import Front


async def start_server(folder: Path, tokenizer_dir: Path, options=None, **settings) -> SimpleNamespace:
    """A server with its data in `folder`, stubs for its services, and what its engine heard."""
    path, log = folder / "scripted", folder / "log"
    path.mkdir(exist_ok=True)
    log.touch()
    defaults = {"tokenizer_dir": str(tokenizer_dir), "log": str(log), "step_ms": 0.2}
    (path / "config.json").write_text(json.dumps(defaults | (options or {})))
    config = ServerConfig(model=str(path), data_dir=str(folder / "data"), **settings)
    front = Front(config, engine_command=(sys.executable, script.__file__))
    try:
        address = await front.start("127.0.0.1:0")
    except BaseException:
        await front.stop()
        raise
    channel = grpc.aio.insecure_channel(address)

    async def stop() -> None:
        await channel.close()
        await front.stop()

    return SimpleNamespace(
        front=front,
        address=address,
        channel=channel,
        stop=stop,
        data=folder / "data",
        generation=generation_pb2_grpc.GenerationServiceStub(channel),
        adapters=adapters_pb2_grpc.AdapterServiceStub(channel),
        tuning=tuning_pb2_grpc.TuningServiceStub(channel),
        strategies=strategies_pb2_grpc.StrategyServiceStub(channel),
        status=server_pb2_grpc.ServerServiceStub(channel),
        heard=lambda kind: [e for e in map(json.loads, log.read_text().splitlines()) if e["type"] == kind],
    )


class Refused:
    """What a failed call says: code, message, and the google.rpc details."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code().name
        self.message = error.details() or ""
        self.trailers = dict(error.trailing_metadata() or ())
        self.reason, self.domain, self.metadata = "", "", {}
        self.fields: dict[str, str] = {}
        self.retry_ms: int | None = None
        status = status_pb2.Status.FromString(self.trailers.get("grpc-status-details-bin", b""))
        for detail in status.details:
            info, bad, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if detail.Unpack(info):
                self.reason, self.domain, self.metadata = info.reason, info.domain, dict(info.metadata)
            elif detail.Unpack(bad):
                self.fields = {violation.field: violation.description for violation in bad.field_violations}
            elif detail.Unpack(retry):
                self.retry_ms = retry.retry_delay.ToMilliseconds()

    def __repr__(self) -> str:
        return f"{self.code} {self.reason} {self.message!r} {self.fields}"
