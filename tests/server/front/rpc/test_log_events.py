"""What the log tells an operator: each call with who answered and how much, adapters, data sets and jobs."""

from __future__ import annotations

import errno
import logging

import pytest
from tests.server import scripted_engine as script
from tests.server.front.rpc.adapter_harness import create, generate
from tests.server.front.rpc.tuning_harness import create as create_job
from tests.server.front.rpc.tuning_harness import upload, watch
from tests.waiting import until

from graftwork.v1 import adapters_pb2, generation_pb2, tuning_pb2
from graftwork_server.durable import storage_errors
from graftwork_server.hub.files.store import Store


@pytest.fixture
def told(caplog):
    """told(sentence): the fields of the last line with it, None if there is none."""
    caplog.set_level(logging.INFO)

    def look(sentence):
        found = [r for r in caplog.records if r.getMessage() == sentence]
        return found[-1].graftwork_fields if found else None

    return look


async def test_a_call_says_who_answered_and_how_much(server, told):
    await create(server, "a")
    await generate(server, "a")
    fields = told("Generate OK")
    assert (fields["model"], fields["version"]) == ("a", 1)
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (1, 2)
    assert 0 < fields["first_token_ms"] <= fields["total_ms"]
    request = generation_pb2.ScoreRequest(model="a", text="abc")
    await server.generation.Score(request)
    assert told("Score OK")["prompt_tokens"] == 3


async def test_a_call_that_was_broken_off_says_how_far_it_came(server, told):
    request = generation_pb2.GenerateRequest(
        model="base",
        token_ids=generation_pb2.TokenIds(ids=[script.HANG, 97]),
        sampling=generation_pb2.SamplingParameters(max_tokens=100),
    )
    call = server.generation.Generate(request)
    await call.read()
    call.cancel()
    await until(lambda: told("Generate CANCELLED") is not None)
    assert told("Generate CANCELLED")["completion_tokens"] == 1


async def test_adapters_are_told_by_name(server, told):
    await create(server, "a")
    assert told("adapter published")["adapter"] == "adapters/a/versions/1"
    assert told("CreateAdapter OK")["adapter"] == "adapters/a/versions/1"
    await server.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="adapters/a"))
    assert told("adapter loaded")["adapter"] == "adapters/a/versions/1"
    await server.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="adapters/a"))
    assert told("adapter unloaded")["adapter"] == "adapters/a/versions/1"
    await server.adapters.DeleteVersion(adapters_pb2.DeleteVersionRequest(name="adapters/a/versions/1"))
    assert told("version deleted") == {"adapter": "adapters/a/versions/1", "newest_version": 0}
    await create(server, "b")
    await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="adapters/b"))
    assert told("adapter deleted") == {"adapter": "adapters/b", "versions": 1}


async def test_jobs_are_told_from_creation_to_their_end(make_server, told):
    server = await make_server()
    job = await create_job(server)
    await watch(server, job.name)
    for sentence in ("job created", "job started", "job published"):
        assert told(sentence)["job"] == job.job_id, sentence
    assert (told("job created")["strategy"], told("job created")["rows"]) == ("lora", 10)
    assert told("job published")["adapter"] == "adapters/tuned/versions/1"
    assert told("CreateTuningJob OK")["job"] == job.job_id
    dataset = (await upload(server)).dataset
    assert told("data set stored")["dataset"] == dataset.dataset_id
    await server.tuning.DeleteDataset(tuning_pb2.DeleteDatasetRequest(name=dataset.name))
    assert told("data set deleted") == {"dataset": dataset.dataset_id}


async def test_what_is_expected_leaves_no_traceback(server, told, refused, monkeypatch, caplog):
    def full(_):
        with storage_errors("preparing an upload"):
            raise OSError(errno.ENOSPC, "No space left on device")

    await refused(upload(server, b"x\n"))
    assert told("UploadDataset INVALID_ARGUMENT DATASET_INVALID")["total_ms"] > 0
    monkeypatch.setattr(Store, "new_staging", full)
    assert (await refused(create(server, "a"))).reason == "STORAGE_FULL"
    call = server.generation.Generate(generation_pb2.GenerateRequest(model="nobody", text="x"))
    await refused(call)
    assert told("Generate NOT_FOUND ADAPTER_NOT_FOUND") is not None
    assert not [record for record in caplog.records if record.exc_info]
