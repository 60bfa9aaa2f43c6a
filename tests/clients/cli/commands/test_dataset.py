"""graftwork dataset: what each command sends, prints and exits with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.clients.cli.running import objects
from tests.clients.scripted_server import ScriptedServer

from graftwork.v1 import tuning_pb2 as t


def test_dataset_check(server: ScriptedServer, run: Any, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(b"x")
    bad = [t.LineError(line=n, reason=f"reason {n}") for n in (2, 7)]
    server.on("ValidateDataset", t.ValidateDatasetResponse(errors=bad, error_count=5, row_count=1))
    lines = run("dataset", "check", str(data), "--max-sequence-tokens", "32", code=1).stdout.splitlines()
    assert lines[:3] == [f"{data}:2: reason 2", f"{data}:7: reason 7", "... and 3 more problems"]
    assert server.requests("ValidateDataset")[0][0].check.max_sequence_tokens == 32
    assert objects(run("dataset", "check", str(data), "--json", code=1))[0]["error_count"] == 5
    server.on("ValidateDataset", t.ValidateDatasetResponse(errors=[t.LineError(reason="no rows")], error_count=1))
    assert run("dataset", "check", str(data), code=1).stdout.startswith(f"{data}: no rows\n")
    server.on("ValidateDataset", t.ValidateDatasetResponse(valid=True, format=t.DATASET_FORMAT_CHAT))
    assert "chat" in run("dataset", "check", str(data)).stdout


def test_data_sets_and_jobs_are_listed_and_deleted(server: ScriptedServer, run: Any) -> None:
    stored = t.Dataset(
        name="datasets/ds-1",
        dataset_id="ds-1",
        display_name="rows.jsonl",
        format=t.DATASET_FORMAT_CHAT,
        row_count=12345,
        size_bytes=2_000_000,
    )
    server.on("ListDatasets", t.ListDatasetsResponse(datasets=[stored]))
    server.on("GetDataset", t.GetDatasetResponse(dataset=stored))
    server.on("DeleteDataset", t.DeleteDatasetResponse())
    server.on("GetTuningJob", t.GetTuningJobResponse(job=t.TuningJob(job_id="j1")))
    server.on("DeleteTuningJob", t.DeleteTuningJobResponse())
    assert run("dataset", "list").stdout.splitlines() == [
        "DATA SET  NAME        FORM  ROWS    CREATED",
        "ds-1      rows.jsonl  chat  12,345  -",
    ]
    assert "rows      12,345" in run("dataset", "show", "ds-1").stdout
    assert run("dataset", "delete", "ds-1").stdout == "deleted ds-1\n"
    assert run("tune", "delete", "j1", "--yes").stdout == "deleted j1\n"
    assert objects(run("tune", "delete", "j1", "--json")) == [{"job_id": "j1"}]
