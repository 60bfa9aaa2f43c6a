"""Hostile files over the wire: who sent them is told so, and everybody else is answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import signal

import psutil
import pytest
from tests import hostile
from tests.processes import helpers
from tests.server.front.rpc.adapter_harness import create, files_of, get
from tests.server.front.rpc.tuning_harness import ROWS, upload, validate
from tests.waiting import until

from graftwork.v1 import adapters_pb2, generation_pb2
from graftwork.v1 import tuning_pb2 as pb
from graftwork_server.text.strangers import helper_pool, isolated_text
from graftwork_server.tuning.data import check as dataset_check

MEBIBYTE = 1 << 20


def chat(server, model, content="a"):
    request = generation_pb2.ChatRequest(
        model=model,
        messages=[generation_pb2.ChatMessage(role="user", content=content)],
        sampling=generation_pb2.SamplingParameters(max_tokens=2),
    )
    return server.generation.Chat(request)


def tokenize(server, model, **fields):
    return server.generation.Tokenize(generation_pb2.TokenizeRequest(model=model, **fields))


async def publish(server, adapter_id, template=None, document=None):
    own = {} if template is None else {"chat_template.jinja": template.encode()}
    own |= {} if document is None else {"tokenizer.json": json.dumps(document).encode()}
    return await create(server, adapter_id, files_of(adapter_id) | own)


async def answered(call) -> list:
    return [message async for message in call]


@pytest.fixture
def document(tokenizer_dir):
    return json.loads((tokenizer_dir / "tokenizer.json").read_text())


# ---------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("what", ["a post-processor's bomb", "a token that is missing", "a prefix that merges lack"])
async def test_a_hostile_tokenizer_is_refused_while_others_are_answered(shared, refused, document, what):
    before = psutil.Process().memory_info().rss
    calls = [refused(publish(shared, f"bad-{n}", document=hostile.TOKENIZERS[what](document))) for n in range(4)]
    refusals = asyncio.gather(*calls)
    while not refusals.done():
        assert await tokenize(shared, "base", text="abc")
        assert psutil.Process().memory_info().rss - before < 64 * MEBIBYTE
        assert len(helpers()) <= 4 * helper_pool.helper_count()
    for error in await refusals:
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "TOKENIZER_MISMATCH")
        assert list(error.fields) == ["tokenizer.json"]
    assert list((shared.data / "staging").iterdir()) == []


async def test_a_tokenizer_of_its_own_serves_every_method(server, document):
    await publish(server, "own", hostile.HARMLESS, hostile.with_added(document, ["<|tool|>"]))
    tokens = await tokenize(server, "own", text="a<|tool|>b")
    assert list(tokens.token_ids) == [97, 257, 98]
    assert list(tokens.tokens) == ["a", "<|tool|>", "b"]
    messages = [generation_pb2.ChatMessage(role="user", content="<|tool|>")]
    assert list((await tokenize(server, "own", messages=messages)).token_ids) == [257]
    score = await server.generation.Score(generation_pb2.ScoreRequest(model="own", text="a<|tool|>"))
    assert [token.text for token in score.tokens] == ["a", "<|tool|>"]
    sampling = generation_pb2.SamplingParameters(max_tokens=2, bad_words=["<|tool|>"])
    request = generation_pb2.GenerateRequest(model="own", text="a", sampling=sampling)
    assert (await answered(server.generation.Generate(request)))[-1].model == "own"
    assert (await answered(chat(server, "own")))[-1].model == "own"


async def test_a_looping_template_makes_nobody_wait(server, refused, monkeypatch):
    """While it loops, adapters are listed, deleted and chatted with, by the first use of another one too."""
    await publish(server, "looping", hostile.LOOPING)
    await publish(server, "harmless", hostile.HARMLESS)
    await publish(server, "gone")
    monkeypatch.setattr(isolated_text, "SECONDS", 600.0)
    looping = [asyncio.create_task(refused(chat(server, "looping"))) for _ in range(10)]
    await until(lambda: server.front.sequence_limit.held == 10)
    for _ in range(3):
        assert (await get(server, "adapters/looping")).adapter.version == 1
        assert await answered(chat(server, "harmless"))
    await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="adapters/gone"))
    assert not any(task.done() for task in looping)
    for task in looping:
        task.cancel()
    await asyncio.gather(*looping, return_exceptions=True)
    await until(lambda: server.front.sequence_limit.held == 0, 60)


async def test_what_a_template_may_take_is_said(server, refused, monkeypatch):
    await publish(server, "looping", hostile.LOOPING)
    monkeypatch.setattr(isolated_text, "SECONDS", 0.5)
    error = await refused(chat(server, "looping"))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "CHAT_TEMPLATE_REJECTED")
    assert "more than the 0.5 s of a processor" in error.message


# ---------------------------------------------------------------------------------------------- data sets


async def test_forty_checks_at_once_are_as_many_processes_as_may_be(make_server):
    others = len(helpers())
    server = await make_server()
    data = hostile.plain_rows(370_000)
    checks = asyncio.gather(*(validate(server, data) for _ in range(40)))
    most = 0
    while not checks.done():
        most = max(most, len(helpers()) - others)
        assert await tokenize(server, "base", text="abc")
        await asyncio.sleep(0.01)
    assert all(report.valid for report in await checks)
    assert 1 <= most <= helper_pool.helper_count()


async def test_a_full_queue_is_said(server, refused, monkeypatch):
    monkeypatch.setattr(helper_pool, "QUEUE_PER_KEY", 2)
    checks = [asyncio.create_task(refused(validate(server, hostile.plain_rows(500_000)))) for _ in range(12)]
    await until(lambda: any(check.done() for check in checks), 60)
    error = next(check for check in checks if check.done()).result()
    assert (error.code, error.reason, error.retry_ms) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1000)
    assert "data sets" in error.message
    for check in checks:
        check.cancel()
    await asyncio.gather(*checks, return_exceptions=True)


async def test_a_check_that_takes_too_long_or_is_killed_fails_alone(server, refused, monkeypatch):
    assert (await validate(server, ROWS)).valid
    for helper in helpers():
        helper.send_signal(signal.SIGSTOP)  # as something that never ends
    monkeypatch.setattr(dataset_check, "SECONDS", 0.5)
    error = await refused(validate(server, ROWS))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DATASET_TOO_COSTLY")
    for helper in helpers():
        helper.send_signal(signal.SIGCONT)
    monkeypatch.setattr(dataset_check, "SECONDS", 60.0)
    assert (await upload(server)).dataset.row_count == 10


# ---------------------------------------------------------------------------------------------- uploads


def stalled(server, method):
    """An upload whose first message came and nothing after it."""
    first = {
        "UploadDataset": pb.UploadDatasetRequest(upload=pb.DatasetUpload()),
        "ValidateDataset": pb.ValidateDatasetRequest(check=pb.DatasetCheck()),
        "CreateAdapter": adapters_pb2.CreateAdapterRequest(
            upload=adapters_pb2.AdapterUpload(
                adapter_id="late", files=[adapters_pb2.FileInfo(name="adapter_config.json", size_bytes=9)]
            )
        ),
    }[method]

    async def requests():
        yield first
        await asyncio.Event().wait()

    stub = server.adapters if method == "CreateAdapter" else server.tuning
    return getattr(stub, method)(requests())


@pytest.mark.parametrize("method", ["UploadDataset", "ValidateDataset", "CreateAdapter"])
async def test_an_upload_that_stalls_is_ended(make_server, refused, method):
    server = await make_server(upload_idle_seconds=0.3)
    error = await refused(stalled(server, method))
    assert (error.code, error.reason) == ("DEADLINE_EXCEEDED", "UPLOAD_IDLE")
    assert "0.3 s" in error.message
    await until(lambda: list((server.data / "staging").iterdir()) == [])


async def test_open_uploads_of_a_client_are_counted(make_server, refused):
    server = await make_server(max_uploads_per_client=3)
    staging = server.data / "staging"
    open_ones = [asyncio.create_task(refused(stalled(server, "UploadDataset"))) for _ in range(3)]
    await until(lambda: len(list(staging.iterdir())) == 3)
    for call in (upload(server), validate(server, ROWS), create(server, "a")):
        error = await refused(call)
        assert (error.code, error.reason, error.retry_ms) == ("RESOURCE_EXHAUSTED", "TOO_MANY_UPLOADS", 1000)
    for task in open_ones:
        task.cancel()
    await asyncio.gather(*open_ones, return_exceptions=True)
    await until(lambda: list(staging.iterdir()) == [])
    assert (await upload(server)).dataset.row_count == 10
