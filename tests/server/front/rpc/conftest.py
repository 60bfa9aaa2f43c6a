"""A whole server in this process - real gRPC, real hub, real job manager - with the scripted engine as its engine."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from tests.server.front.rpc.rpc_harness import Refused, start_server
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from graftwork_server.front import engine_supervisor

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


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


def pytest_collection_modifyitems(items):
    """One loop for all tests here: the server that many share lives on it, and grpc.aio wants one per process."""
    mark = pytest.mark.asyncio(loop_scope="session")
    for item in items:
        if Path(__file__).parent in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(mark, append=False)


@pytest_asyncio.fixture(loop_scope="session")
async def make_server(tmp_path, tokenizer_dir, monkeypatch):
    """Starts servers: `await make_server(options={...}, max_queue=...)`. All are stopped at the end."""
    monkeypatch.setattr(engine_supervisor, "FIRST_BACKOFF_SECONDS", 0.02)
    started = []

    async def make(options=None, **settings):
        started.append(await start_server(tmp_path, tokenizer_dir, options, **settings))
        return started[-1]

    yield make
    for server in started:
        await server.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def server(make_server):
    """A server of the test's own, with default settings."""
    return await make_server()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(tmp_path_factory, tokenizer_dir):
    """A server for tests that leave nothing behind."""
    server = await start_server(tmp_path_factory.mktemp("shared"), tokenizer_dir)
    yield server
    await server.stop()


@pytest.fixture
def refused():
    """`await refused(call)`: the error of a call that must fail; a stream is read to its end."""

    async def read(call) -> Refused:
        try:
            if hasattr(call, "read"):
                while await call.read() is not grpc.aio.EOF:
                    pass
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return Refused(error)
        pytest.fail("the call was answered")

    return read
