"""client.tuning, and what it lists and deletes as other resources do."""

from __future__ import annotations

from tests.clients.protos import job, succeeded
from tests.clients.scripted_server import ScriptedServer

import graftwork
from graftwork.v1 import strategies_pb2 as s
from graftwork.v1 import tuning_pb2 as t


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
