"""A whole server in this process - real gRPC, real hub, real job manager - with the scripted engine as its engine."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import grpc
import pytest
import scripted_engine as script
from google.rpc import error_details_pb2, status_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from graftwork.v1 import adapters_pb2_grpc, generation_pb2_grpc, strategies_pb2_grpc, tuning_pb2_grpc
from graftwork_server.config import ServerConfig
from graftwork_server.engine import client as client_module
from graftwork_server.front import Front

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def byte_tokens() -> list[str]:
    """The character by which byte-level tokenizers write each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A tokenizer whose token ids are the text's bytes, with </s> as 256."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE(vocab={char: id for id, char in enumerate(byte_tokens())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
async def make_server(tmp_path, tokenizer_dir, monkeypatch):
    """Starts servers: `await make_server(options={...}, max_queue=...)`. All are stopped at the end."""
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_SECONDS", 0.02)
    started = []

    async def make(options=None, **settings):
        path = tmp_path / "options.json"
        log = tmp_path / "log"
        path.write_text(
            json.dumps({"tokenizer_dir": str(tokenizer_dir), "log": str(log), "step_ms": 0.2, **(options or {})})
        )
        config = ServerConfig(model=str(path), data_dir=str(tmp_path / "data"), listen="127.0.0.1:0", **settings)
        front = Front(config, engine_command=(sys.executable, script.__file__))
        address = await front.start("127.0.0.1:0")
        channel = grpc.aio.insecure_channel(address)
        started.append((front, channel))
        return SimpleNamespace(
            front=front,
            address=address,
            channel=channel,
            generation=generation_pb2_grpc.GenerationServiceStub(channel),
            adapters=adapters_pb2_grpc.AdapterServiceStub(channel),
            tuning=tuning_pb2_grpc.TuningServiceStub(channel),
            strategies=strategies_pb2_grpc.StrategyServiceStub(channel),
            heard=lambda kind: [e for e in map(json.loads, log.read_text().splitlines()) if e["type"] == kind],
        )

    yield make
    for front, channel in started:
        await channel.close()
        await front.stop()


@pytest.fixture
async def server(make_server):
    """A server with default settings."""
    return await make_server()


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


@pytest.fixture
def refused():
    """`await refused(call)`: the error of a call that must fail; a stream is read to its end."""

    async def read(call) -> Refused:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if hasattr(call, "__aiter__"):
                _ = [message async for message in call]
            else:
                await call
        return Refused(caught.value)

    return read
