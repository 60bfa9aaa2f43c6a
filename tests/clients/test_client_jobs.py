"""Tuning jobs as futures: results, failures, events across breaks; and lists that page by themselves."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from google.protobuf import struct_pb2
from tests.clients.protos import adapter, event, job, step_event, succeeded
from tests.clients.scripted_server import ScriptedServer, fail, hold

import graftwork
from graftwork.transport import retries
from graftwork.v1 import adapters_pb2 as a
from graftwork.v1 import strategies_pb2 as s
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


def test_create_sends_the_spec(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("CreateTuningJob", t.CreateTuningJobResponse(job=job(t.TUNING_JOB_STATE_PENDING)))
    handle = client.tuning.create(
        strategy="lora",
        dataset=graftwork.Dataset("datasets/d1", "d1", "", "text", 1, 1, None),
        adapter="dates",
        config={"rank": 8, "target_modules": ["q_proj"], "rslora": True},
        validation="datasets/d2",
        load=True,
    )
    spec = server.requests("CreateTuningJob")[0].spec
    assert (spec.dataset, spec.validation_dataset, spec.adapter_id, spec.load) == (
        "datasets/d1",
        "datasets/d2",
        "dates",
        True,
    )
    assert spec.config["rank"] == 8.0
    assert list(spec.config["target_modules"]) == ["q_proj"]
    assert (handle.id, handle.state, handle.done) == ("j1", "pending", False)
    config = handle.info.spec.config
    assert config == {"rank": 8, "learning_rate": 0.0002}
    assert isinstance(config["rank"], int)


def test_cancel(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("GetTuningJob", got(job()))
    server.on("CancelTuningJob", t.CancelTuningJobResponse(job=job(t.TUNING_JOB_STATE_CANCELLED)))
    handle = client.tuning.get("tuningJobs/j1")
    assert handle.cancel().state == "cancelled"
    assert handle.done
    assert server.requests("CancelTuningJob")[0].name == "tuningJobs/j1"


def pages(request: a.ListAdaptersRequest, context: grpc.ServicerContext) -> a.ListAdaptersResponse:
    start = int(request.page_token or 0)
    items = [adapter(f"a{number}") for number in range(start, min(start + 2, 5))]
    return a.ListAdaptersResponse(adapters=items, next_page_token=str(start + 2) if start + 2 < 5 else "")


async def test_lists_page_by_themselves(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    server.on("ListAdapters", pages)
    expected = [f"a{number}" for number in range(5)]
    assert [item.adapter_id for item in client.adapters.list(page_size=2)] == expected
    assert [(r.page_size, r.page_token) for r in server.requests("ListAdapters")] == [(2, ""), (2, "2"), (2, "4")]
    assert [item.adapter_id async for item in aclient.adapters.list()] == expected


async def test_versions_page_by_themselves(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    def versions(request: a.ListVersionsRequest, context: grpc.ServicerContext) -> a.ListVersionsResponse:
        number = int(request.page_token or 3)
        return a.ListVersionsResponse(versions=[adapter(version=number)], next_page_token=str(number - 1 or ""))

    server.on("ListVersions", versions)
    assert [item.version for item in client.adapters.versions("dates")] == [3, 2, 1]
    assert [item.version async for item in aclient.adapters.versions("adapters/dates", page_size=1)] == [3, 2, 1]
    assert [(r.parent, r.page_size) for r in server.requests("ListVersions")] == [("adapters/dates", 0)] * 3 + [
        ("adapters/dates", 1)
    ] * 3
    with pytest.raises(ValueError, match="without a version"):
        list(client.adapters.versions("dates@1"))


def test_lists_fetch_no_page_too_many(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("ListAdapters", pages)
    items = client.adapters.list()
    assert server.seen == []
    assert [next(items).adapter_id, next(items).adapter_id] == ["a0", "a1"]
    assert len(server.seen) == 1


async def test_jobs_and_strategies_are_listed(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    strategy = s.Strategy(strategy_id="lora", config_json_schema='{"properties": {}}', capabilities=["train"])
    broken = s.Strategy(strategy_id="x", config_json_schema="{", load_error="ImportError: no")
    server.on("ListStrategies", s.ListStrategiesResponse(strategies=[strategy, broken]))
    server.on("GetStrategy", s.GetStrategyResponse(strategy=strategy))
    server.on("ListTuningJobs", t.ListTuningJobsResponse(jobs=[job(), succeeded("j2")]))
    assert [item.load_error for item in client.strategies.list()] == ["", "ImportError: no"]
    assert [item.config_schema async for item in aclient.strategies.list()] == [{"properties": {}}, {}]
    assert client.strategies.get("lora") == await aclient.strategies.get("strategies/lora")
    assert {request.name for request in server.requests("GetStrategy")} == {"strategies/lora"}
    assert [handle.id for handle in client.tuning.list()] == ["j1", "j2"]
    assert [handle.state async for handle in aclient.tuning.list()] == ["running", "succeeded"]


async def test_adapter_calls(server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient) -> None:
    report = a.LoadReport(modules_bound=3, already_loaded=True)
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter(version=2)))
    server.on("LoadAdapter", a.LoadAdapterResponse(adapter=adapter(loaded=True), load_report=report))
    server.on("UnloadAdapter", a.UnloadAdapterResponse(adapter=adapter()))
    server.on("PinAdapter", a.PinAdapterResponse(adapter=adapter(pinned=True), load_report=report))
    server.on("UnpinAdapter", a.UnpinAdapterResponse(adapter=adapter()))
    server.on("DeleteAdapter", a.DeleteAdapterResponse(deleted_versions=2))
    assert (client.adapters.pin("dates").pinned, (await aclient.adapters.pin("dates")).pinned) == (True, True)
    assert client.adapters.pin("dates").load_report == graftwork.LoadReport(3, 0, 0, 0.0, True)
    assert not client.adapters.unpin("dates@1").pinned
    assert not (await aclient.adapters.unpin("dates")).pinned
    assert {seen.request.name for seen in server.seen} == {"adapters/dates", "adapters/dates/versions/1"}
    server.seen.clear()
    found = client.adapters.get("dates@2")
    assert client.adapters.load(found).load_report == graftwork.LoadReport(3, 0, 0, 0.0, True)
    assert (await aclient.adapters.load("dates")).loaded
    assert client.adapters.unload("adapters/dates/versions/1").load_report is None
    assert not (await aclient.adapters.unload("dates")).loaded
    assert client.adapters.delete(found) == 2
    assert await aclient.adapters.delete("dates") == 2
    assert [seen.request.name for seen in server.seen] == [
        "adapters/dates/versions/2",
        "adapters/dates/versions/2",
        "adapters/dates",
        "adapters/dates/versions/1",
        "adapters/dates",
        "adapters/dates",
        "adapters/dates",
    ]
    for wrong in ("dates@x", "dates@", "dates@-1"):
        with pytest.raises(ValueError, match="ID@VERSION"):
            client.adapters.get(wrong)
    server.seen.clear()
    server.on("DeleteVersion", a.DeleteVersionResponse(newest_version=1))
    assert client.adapters.delete("dates@2") == 1
    assert await aclient.adapters.delete("adapters/dates/versions/2") == 1
    assert {(seen.method, seen.request.name) for seen in server.seen} == {
        ("DeleteVersion", "adapters/dates/versions/2")
    }
    server.seen.clear()
    client.adapters.get("dates@latest")
    assert [seen.request.name for seen in server.seen] == ["adapters/dates"]


async def test_data_sets_and_jobs_are_listed_and_deleted(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    one, two = (t.Dataset(name=f"datasets/ds-{n}", dataset_id=f"ds-{n}", row_count=n) for n in (1, 2))
    server.on("GetDataset", t.GetDatasetResponse(dataset=one))
    first = t.ListDatasetsResponse(datasets=[two], next_page_token="n")
    server.on(
        "ListDatasets", first, t.ListDatasetsResponse(datasets=[one]), first, t.ListDatasetsResponse(datasets=[one])
    )
    server.on("DeleteDataset", t.DeleteDatasetResponse())
    server.on("DeleteTuningJob", t.DeleteTuningJobResponse())
    found = client.datasets.get("ds-1")
    assert found == await aclient.datasets.get(found)
    assert [dataset.row_count for dataset in client.datasets.list()] == [2, 1]
    assert [dataset.row_count async for dataset in aclient.datasets.list()] == [2, 1]
    client.datasets.delete(found)
    await aclient.datasets.delete("ds-1")
    client.tuning.delete("j1")
    await aclient.tuning.delete("j1")
    names = {(seen.method, seen.request.name) for seen in server.seen if seen.method.startswith("Delete")}
    assert names == {("DeleteDataset", "datasets/ds-1"), ("DeleteTuningJob", "tuningJobs/j1")}


def test_watch_has_a_deadline_and_a_bound_on_its_waits() -> None:
    watch = retries.Watch(after_sequence=0, timeout=0.05)
    assert 0 < watch.attach_timeout_s() <= 0.05
    time.sleep(0.06)
    assert watch.timed_out()
    assert watch.attach_timeout_s() == 0.0
    assert retries.Watch(after_sequence=0, timeout=None).attach_timeout_s() == retries.ATTACH_S
