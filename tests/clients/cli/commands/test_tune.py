"""graftwork tune: what each command sends, prints and exits with."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2
from tests.clients.cli.running import objects, start
from tests.clients.protos import event, job, step_event, succeeded
from tests.clients.scripted_server import ScriptedServer, fail, hold

from graftwork.v1 import tuning_pb2 as t

ESTIMATE = "3 steps, 1,234 parameters, 2.5 MB more memory, artifact 900 B"


@pytest.fixture
def tuning(server: ScriptedServer, tmp_path: Path) -> list[str]:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    held_out = tmp_path / "v.jsonl"
    held_out.write_text('{"text": "b"}\n')

    def store(request: Any, context: grpc.ServicerContext) -> t.UploadDatasetResponse:
        name = request[0].upload.display_name
        return t.UploadDatasetResponse(dataset=t.Dataset(name=f"datasets/{name}", dataset_id=name))

    server.on("UploadDataset", store)
    estimate = t.TuningEstimate(trained_parameters=1234, memory_bytes=2_500_000, artifact_bytes=900, total_steps=3)
    pending = job(t.TUNING_JOB_STATE_PENDING, estimate=estimate)
    server.on("CreateTuningJob", t.CreateTuningJobResponse(job=pending))
    server.on(
        "WatchTuningJob",
        [
            event(1, state=t.TUNING_JOB_STATE_RUNNING),
            step_event(2, 1),
            event(3, evaluation=t.TuningEvaluation(step=1, loss=0.25)),
            event(4, checkpoint_step=1),
            event(5, message="resumed"),
            event(6, state=t.TUNING_JOB_STATE_SUCCEEDED),
        ],
    )
    server.on("GetTuningJob", t.GetTuningJobResponse(job=succeeded()))
    create = ["tune", "create", "--strategy", "lora", "--adapter", "dates"]
    return [*create, "--data", str(data), "--validation", str(held_out)]


def test_tune_create(server: ScriptedServer, run: Any, tuning: list[str]) -> None:
    sets = ["rank=16", "learning_rate=2e-4", "target_modules=all-linear", 'names=["a"]', "x=", "load=null"]
    flags = [part for setting in sets for part in ("--set", setting)]
    (created,) = objects(run(*tuning, *flags, "--load", "--json"))
    assert (created["job_id"], created["state"]) == ("j1", "pending")
    assert created["spec"]["config"] == {"rank": 8, "learning_rate": 0.0002}
    assert [seen.method for seen in server.seen] == [
        "CreateTuningJob",  # validates only, before anything is uploaded
        "UploadDataset",
        "UploadDataset",
        "CreateTuningJob",
    ]
    checked, asked = server.requests("CreateTuningJob")
    assert (checked.validate_only, asked.validate_only) == (True, False)
    assert (checked.spec.config, checked.spec.dataset) == (asked.spec.config, "")
    assert not asked.spec.new_version
    run(*tuning, "--new-version")
    assert all(request.spec.new_version for request in server.requests("CreateTuningJob")[2:])
    spec = asked.spec
    assert (spec.dataset, spec.validation_dataset, spec.load) == ("datasets/d.jsonl", "datasets/v.jsonl", True)
    config = spec.config
    assert (config["rank"], config["learning_rate"]) == (16.0, 2e-4)
    assert (config["target_modules"], config["x"], config["load"]) == ("all-linear", "", None)
    assert list(config["names"]) == ["a"]
    shown = run(*tuning).stdout
    assert shown.startswith("job       j1\n")
    assert f"estimate  {ESTIMATE}\n" in shown


def test_tune_show_says_what_was_chosen_and_why(server: ScriptedServer, run: Any) -> None:
    chosen = [
        t.SettingChoice(key="max_steps", value=struct_pb2.Value(number_value=150), reason="why", automatic=True),
        t.SettingChoice(key="rank", value=struct_pb2.Value(number_value=8), reason="set in the request"),
    ]
    server.on("GetTuningJob", t.GetTuningJobResponse(job=job(choices=chosen)))
    lines = [line for line in run("tune", "show", "j1").stdout.splitlines() if line.startswith("chosen")]
    assert [" ".join(line.split()) for line in lines] == ["chosen max_steps=150: why"]


def test_tune_follow_in_plain_lines(run: Any, tuning: list[str]) -> None:
    lines = run(*tuning, "--follow").stdout.splitlines()
    assert lines[:8] == [
        "job j1",
        f"estimate  {ESTIMATE}",
        "running",
        "step 1/3  loss 1.5000  lr 2.00e-04  1234 tok/s  ETA 5.0s",
        "step 1  held-out loss 0.2500",
        "checkpoint at step 1",
        "resumed",
        "succeeded",
    ]
    assert "version        adapters/dates/versions/2" in lines
    assert "training loss  0.5000, the mean of the last tenth of the steps" in lines
    assert "trained        10 parameters in 1m05s" in lines


def test_tune_follow_as_json(run: Any, tuning: list[str]) -> None:
    *events, ended = objects(run(*tuning, "--follow", "--json"))
    assert [item["sequence"] for item in events] == [1, 2, 3, 4, 5, 6]
    assert ended["result"]["adapter_version"] == "adapters/dates/versions/2"


def test_a_failed_job_exits_with_5(server: ScriptedServer, run: Any, tuning: list[str]) -> None:
    failed = job(t.TUNING_JOB_STATE_FAILED, error="loss is NaN", error_reason="LOSS_NOT_FINITE")
    server.on("GetTuningJob", t.GetTuningJobResponse(job=failed))
    server.on("WatchTuningJob", [event(1, state=t.TUNING_JOB_STATE_FAILED)])
    assert run(*tuning, "--follow", code=5).stderr == "error: tuning job j1 failed: loss is NaN\n"
    result = run("tune", "watch", "j1", "--json", code=5)
    assert objects(result)[-1]["state"] == "failed"
    assert json.loads(result.stderr)["error"]["code"] == "JOB_FAILED"
    assert "loss is NaN [LOSS_NOT_FINITE]" in run("tune", "show", "j1").stdout


def test_tune_list_watch_cancel(server: ScriptedServer, run: Any, tuning: list[str]) -> None:
    server.on("ListTuningJobs", t.ListTuningJobsResponse(jobs=[job(), succeeded("j2")]))
    server.on("CancelTuningJob", t.CancelTuningJobResponse(job=job(t.TUNING_JOB_STATE_CANCELLED)))
    assert [line.split()[0] for line in run("tune", "list").stdout.splitlines()] == ["JOB", "j1", "j2"]
    assert [item["job_id"] for item in objects(run("tune", "list", "--json"))[0]] == ["j1", "j2"]
    assert "running" in run("tune", "watch", "j1", "--after-sequence", "0").stdout
    assert run("tune", "cancel", "j1").stdout == "job j1 cancelled\n"
    server.on("GetTuningJob", fail(grpc.StatusCode.NOT_FOUND))
    run("tune", "watch", "j9", code=4)


def test_leaving_a_job_says_that_it_goes_on(server: ScriptedServer) -> None:
    gone = threading.Event()
    server.on("GetTuningJob", t.GetTuningJobResponse(job=job()))
    server.on("WatchTuningJob", hold([step_event(1, 1)], gone))
    process = start(server, "tune", "watch", "j1")
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"step 1/3")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors == b"job j1 goes on; see: graftwork tune watch j1\n"
    assert process.returncode == 130
    assert gone.wait(10)
    assert server.requests("CancelTuningJob") == []
