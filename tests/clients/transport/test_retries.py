"""What is sent again, what never is, and what stays the same between attempts."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from tests.clients.protos import adapter, job, last, piece
from tests.clients.scripted_server import ScriptedServer, fail

import graftwork
from graftwork.transport import retries
from graftwork.v1 import adapters_pb2 as a
from graftwork.v1 import generation_pb2 as g
from graftwork.v1 import tuning_pb2 as t

AWAY = grpc.StatusCode.UNAVAILABLE
BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED


def test_reads_are_retried_with_one_request_id(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("GetAdapter", fail(AWAY), fail(AWAY), a.GetAdapterResponse(adapter=adapter()))
    assert client.adapters.get("dates").adapter_id == "dates"
    assert len(server.seen) == 3
    assert len({seen.metadata["x-request-id"] for seen in server.seen}) == 1


async def test_async_reads_are_retried(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    server.on("GetAdapter", fail(AWAY), fail(AWAY), a.GetAdapterResponse(adapter=adapter()))
    assert (await aclient.adapters.get("dates")).adapter_id == "dates"
    assert len(server.seen) == 3


def test_retries_end(server: ScriptedServer) -> None:
    server.on("GetAdapter", fail(AWAY))
    with graftwork.Client(address=server.address, max_retries=2) as client, pytest.raises(graftwork.UnavailableError):
        client.adapters.get("dates")
    assert len(server.seen) == 3


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.ABORTED, BUSY, grpc.StatusCode.UNKNOWN])
def test_other_failures_are_final(server: ScriptedServer, client: graftwork.Client, code: grpc.StatusCode) -> None:
    server.on("GetAdapter", fail(code), a.GetAdapterResponse())
    with pytest.raises(graftwork.APIError):
        client.adapters.get("dates")
    assert len(server.seen) == 1


def test_a_call_that_a_closing_server_broke_off_counts_as_unavailable(
    server: ScriptedServer, client: graftwork.Client
) -> None:
    broken_off = fail(grpc.StatusCode.CANCELLED, message="CANCELLED")  # gRPC's own answer, which no code of ours gives
    server.on("GetAdapter", broken_off, a.GetAdapterResponse(adapter=adapter()))
    assert client.adapters.get("dates").adapter_id == "dates"
    server.on("LoadAdapter", fail(grpc.StatusCode.CANCELLED, message="by the operator"))
    with pytest.raises(graftwork.CancelledError):
        client.adapters.load("dates")


def test_busy_is_retried_no_sooner_than_it_asks(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Score", fail(BUSY, retry_ms=300), g.ScoreResponse(total_logprob=-1.0))
    start = time.monotonic()
    assert client.score("base", "hi").total_logprob == -1.0
    assert time.monotonic() - start >= 0.3


def test_busy_for_longer_than_the_deadline_is_final(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Score", fail(BUSY, retry_ms=60_000))
    with pytest.raises(graftwork.ResourceExhaustedError) as caught:
        client.score("base", "hi", timeout=10)
    assert caught.value.retry_after_ms == 60_000
    assert len(server.seen) == 1


def test_delete_and_cancel_are_never_sent_twice(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("DeleteAdapter", fail(AWAY))
    server.on("CancelTuningJob", fail(AWAY))
    server.on("GetTuningJob", t.GetTuningJobResponse(job=job()))
    handle = client.tuning.get("j1")
    with pytest.raises(graftwork.UnavailableError):
        client.adapters.delete("dates")
    with pytest.raises(graftwork.UnavailableError):
        handle.cancel()
    assert len(server.requests("DeleteAdapter")) == 1
    assert len(server.requests("CancelTuningJob")) == 1


def test_creates_reuse_their_request_id(server: ScriptedServer, client: graftwork.Client, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
    server.on("CreateTuningJob", fail(AWAY), t.CreateTuningJobResponse(job=job()))
    server.on("CreateAdapter", fail(AWAY), a.CreateAdapterResponse(adapter=adapter()))
    client.tuning.create(strategy="lora", dataset="d1", adapter="dates")
    client.adapters.create("dates", tmp_path)
    jobs = [request.request_id for request in server.requests("CreateTuningJob")]
    adapters = [messages[0].upload.request_id for messages in server.requests("CreateAdapter")]
    for ids in (jobs, adapters):
        assert len(ids) == 2
        assert ids[0] == ids[1]
        assert len(ids[0]) == 32
    client.tuning.create(strategy="lora", dataset="d1", adapter="dates")
    client.tuning.create(strategy="lora", dataset="d1", adapter="dates", request_id="mine")
    later = [request.request_id for request in server.requests("CreateTuningJob")][2:]
    assert later[0] != jobs[0]
    assert later[1] == "mine"


def test_stream_is_retried_before_its_first_piece(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", fail(AWAY), fail(BUSY, retry_ms=1), [piece("a", 1), last("b", 2)])
    assert client.generate("base", "hi").text == "ab"
    assert len(server.seen) == 3


def test_stream_is_never_retried_after_a_piece(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", fail(AWAY, after=[piece("a", 1)]), fail(AWAY, after=[piece("a", 1)]), [last("b", 2)])
    stream = client.generate("base", "hi", stream=True)
    assert next(stream).text == "a"
    with pytest.raises(graftwork.UnavailableError):
        next(stream)
    assert list(stream) == []
    with pytest.raises(graftwork.UnavailableError):
        client.generate("base", "hi")
    assert len(server.seen) == 2


async def test_async_stream_follows_the_same_rule(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    server.on("Generate", fail(AWAY), [piece("a", 1), last("b", 2)])
    assert (await aclient.generate("base", "hi")).text == "ab"
    server.on("Generate", fail(AWAY, after=[piece("a", 1)]), [last("b", 2)])
    stream = await aclient.generate("base", "hi", stream=True)
    assert (await anext(stream)).text == "a"
    with pytest.raises(graftwork.UnavailableError):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert len(server.seen) == 3


def test_every_call_has_a_deadline(server: ScriptedServer) -> None:
    server.on("GetAdapter", a.GetAdapterResponse())
    server.on("Generate", [last()])
    with graftwork.Client(address=server.address, timeout=30) as client:
        client.adapters.get("x")
        client.adapters.get("x", timeout=7)
        client.generate("base", "hi", timeout=5)
    left = [seen.seconds_left for seen in server.seen]
    for bound, seconds in zip((30, 7, 5), left, strict=True):
        assert seconds is not None
        assert bound - 5 < seconds < bound + 0.5  # gRPC rounds it up


def test_deadline_is_an_error_of_its_own(server: ScriptedServer, client: graftwork.Client) -> None:
    def slow(request: object, context: grpc.ServicerContext) -> a.GetAdapterResponse:
        time.sleep(0.6)
        return a.GetAdapterResponse()

    server.on("GetAdapter", slow)
    with pytest.raises(graftwork.DeadlineExceededError):
        client.adapters.get("x", timeout=0.2)


def test_a_server_that_comes_back_is_found_soon(server: ScriptedServer) -> None:
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter()))
    server.stop()
    with graftwork.Client(address=server.address, max_retries=1000) as client:
        with pytest.raises(graftwork.UnavailableError):
            client.adapters.delete("dates")
        server.start()
        # gRPC's own back-off would go on refusing from memory; left at a minute, say, this would time out.
        assert client.adapters.get("dates", timeout=15).adapter_id == "dates"


def test_backoff_grows_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    longest = [max(retries.backoff_s(failures) for _ in range(300)) for failures in (1, 2, 3, 50)]
    assert longest == sorted(longest)
    assert longest[0] <= retries.FIRST_BACKOFF_S
    assert longest[1] > retries.FIRST_BACKOFF_S
    assert longest[3] <= retries.LONGEST_BACKOFF_S


def test_watch_has_a_deadline_and_a_bound_on_its_waits() -> None:
    watch = retries.Watch(after_sequence=0, timeout=0.05)
    assert 0 < watch.attach_timeout_s() <= 0.05
    time.sleep(0.06)
    assert watch.timed_out()
    assert watch.attach_timeout_s() == 0.0
    assert retries.Watch(after_sequence=0, timeout=None).attach_timeout_s() == retries.ATTACH_S
