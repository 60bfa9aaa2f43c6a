"""Tuning jobs as futures: results, failures, events across breaks."""

from __future__ import annotations

import threading

import grpc
import pytest
from google.protobuf import struct_pb2
from tests.clients.protos import event, job, step_event, succeeded
from tests.clients.scripted_server import ScriptedServer, fail, hold

import graftwork
from graftwork.transport import retries
from graftwork.v1 import tuning_pb2 as t

AWAY = grpc.StatusCode.UNAVAILABLE


RUNNING = event(1, state=t.TUNING_JOB_STATE_RUNNING)


DONE = event(5, state=t.TUNING_JOB_STATE_SUCCEEDED)


def got(message: t.TuningJob) -> t.GetTuningJobResponse:
    return t.GetTuningJobResponse(job=message)


@pytest.fixture
def breaking(server: ScriptedServer) -> ScriptedServer:
    """A server that breaks away twice while a job is watched, and repeats an event after the second break."""
    server.on("GetTuningJob", got(job()), got(job()), got(succeeded()))
    server.on(
        "WatchTuningJob",
        fail(AWAY, after=[RUNNING, step_event(2, 1)]),
        fail(AWAY),
        [step_event(2, 1), step_event(3, 2), event(4, evaluation=t.TuningEvaluation(step=2, loss=0.9)), DONE],
    )
    return server


def check_attachments(server: ScriptedServer) -> None:
    assert [request.after_sequence for request in server.requests("WatchTuningJob")] == [0, 2, 2]


def test_events_go_on_after_breaks(breaking: ScriptedServer, client: graftwork.Client) -> None:
    handle = client.tuning.get("j1")
    seen = []
    for item in handle.events():
        seen.append((item.sequence, item.kind))
        if item.kind == "progress":
            assert handle.progress == item.progress
    assert seen == [(1, "state"), (2, "progress"), (3, "progress"), (4, "evaluation"), (5, "state")]
    assert handle.state == "succeeded"
    assert handle.info.validation_loss == 0.9
    check_attachments(breaking)


def test_choices_are_in_the_record(server: ScriptedServer, client: graftwork.Client) -> None:
    value = struct_pb2.Value(number_value=150)
    choice = t.SettingChoice(key="max_steps", value=value, reason="3 passes are few", automatic=True)
    server.on("GetTuningJob", got(job(choices=[choice])))
    (known,) = client.tuning.get("j1").info.choices
    assert known == graftwork.types.SettingChoice("max_steps", 150, "3 passes are few", True)
    assert isinstance(known.value, int)


def test_wait_returns_the_result(breaking: ScriptedServer, client: graftwork.Client) -> None:
    result = client.tuning.get("j1").wait(30)
    assert result.adapter_version == "adapters/dates/versions/2"
    assert result.validation_loss is None
    check_attachments(breaking)


async def test_async_wait_and_events(breaking: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    handle = await aclient.tuning.get("j1")
    assert [item.sequence async for item in handle.events()] == [1, 2, 3, 4, 5]
    check_attachments(breaking)
    result = await handle.wait(30)
    assert result.final_loss == 0.5
    assert handle.result == result


def test_events_start_where_they_are_asked_to(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("GetTuningJob", got(job()))
    server.on("WatchTuningJob", [DONE])
    assert [item.sequence for item in client.tuning.get("j1").events(4)] == [5]
    assert server.requests("WatchTuningJob")[0].after_sequence == 4


@pytest.mark.parametrize(
    ("state", "name"), [(t.TUNING_JOB_STATE_FAILED, "failed"), (t.TUNING_JOB_STATE_CANCELLED, "cancelled")]
)
def test_wait_raises_unless_it_succeeded(
    server: ScriptedServer, client: graftwork.Client, state: t.TuningJobState.ValueType, name: str
) -> None:
    server.on("GetTuningJob", got(job(state, error="loss is NaN", error_reason="LOSS_NOT_FINITE")))
    with pytest.raises(graftwork.JobFailedError, match=f"j1 {name}: loss is NaN") as caught:
        client.tuning.get("j1").wait()
    assert caught.value.job.state == name
    assert caught.value.job.error_reason == "LOSS_NOT_FINITE"


async def test_wait_raises_for_the_async_client(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    server.on("GetTuningJob", got(job(t.TUNING_JOB_STATE_FAILED)))
    with pytest.raises(graftwork.JobFailedError):
        await (await aclient.tuning.get("j1")).wait()


def test_wait_asks_again_when_events_end_early(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("GetTuningJob", got(job()), got(job()), got(job()), got(succeeded()))
    server.on("WatchTuningJob", [RUNNING])
    assert client.tuning.get("j1").wait(30).final_loss == 0.5
    assert [request.after_sequence for request in server.requests("WatchTuningJob")] == [0, 1]


async def test_wait_ends_with_its_timeout(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    gone = threading.Event()
    server.on("GetTuningJob", got(job()))
    server.on("WatchTuningJob", hold([RUNNING], gone))
    with pytest.raises(graftwork.JobTimeoutError) as caught:
        client.tuning.get("j1").wait(0.3)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.job.state == "running"
    assert gone.wait(10)
    with pytest.raises(graftwork.JobTimeoutError):
        await (await aclient.tuning.get("j1")).wait(0.3)


def test_a_quiet_attachment_is_renewed(
    server: ScriptedServer, client: graftwork.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "ATTACH_S", 0.3)
    server.on("GetTuningJob", got(job()))
    server.on("WatchTuningJob", hold([RUNNING], threading.Event()), [DONE])
    assert [item.sequence for item in client.tuning.get("j1").events()] == [1, 5]


def test_a_server_that_stays_away_is_an_error(
    server: ScriptedServer, client: graftwork.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "REATTACH_S", 0.2)
    server.on("GetTuningJob", got(job()))
    server.on("WatchTuningJob", fail(AWAY))
    with pytest.raises(graftwork.UnavailableError):
        list(client.tuning.get("j1").events())
    assert len(server.requests("WatchTuningJob")) > 1


def test_other_errors_end_the_events(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("GetTuningJob", got(job()))
    server.on("WatchTuningJob", fail(grpc.StatusCode.NOT_FOUND))
    with pytest.raises(graftwork.NotFoundError):
        list(client.tuning.get("j1").events())


def test_leaving_the_events_ends_the_call(server: ScriptedServer, client: graftwork.Client) -> None:
    gone = threading.Event()
    server.on("GetTuningJob", got(job()))
    server.on("WatchTuningJob", hold([RUNNING], gone))
    events = client.tuning.get("j1").events()
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert gone.wait(10)


def test_a_restarted_server_is_found_again(server: ScriptedServer, client: graftwork.Client) -> None:
    gone = threading.Event()
    server.on("GetTuningJob", got(job()))
    server.on("WatchTuningJob", hold([RUNNING], gone), [DONE])
    seen = []
    for item in client.tuning.get("j1").events(timeout=30):
        seen.append(item.sequence)
        if item.sequence == 1:
            server.stop()
            threading.Timer(0.5, server.start).start()
    assert seen == [1, 5]


def test_cancel(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("GetTuningJob", got(job()))
    server.on("CancelTuningJob", t.CancelTuningJobResponse(job=job(t.TUNING_JOB_STATE_CANCELLED)))
    handle = client.tuning.get("tuningJobs/j1")
    assert handle.cancel().state == "cancelled"
    assert handle.done
    assert server.requests("CancelTuningJob")[0].name == "tuningJobs/j1"
