"""A database that an earlier server has filled, brought to this server's schema: nothing is lost, all is usable."""

from __future__ import annotations

import datetime
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, text

from graftwork_server.hub.database import connection as database_module
from graftwork_server.hub.database.connection import Database
from graftwork_server.hub.database.records import StateChanged
from graftwork_server.hub.database.tables import Base
from graftwork_server.hub.datasets import Datasets
from graftwork_server.hub.job_registry import JobRegistry
from graftwork_server.hub.registry import Registry, RequestKey
from graftwork_server.types import DatasetFormat, JobState, TuningProgress
from graftwork_server.wire.tuning import Checkpointed, Evaluated, Note, Progress

TIME = datetime.datetime(2026, 3, 4, 5, 6, 7, 89, datetime.UTC)
MICROSECONDS = 1_772_600_767_000_089
DIGEST = "sha256:" + "ab" * 32
PROGRESS = {
    "step": 3, "total_steps": 9, "loss": 1.5, "learning_rate": 0.01, "tokens_per_second": 7.0, "eta_ms": 60,
    "seen_tokens": 90,
}  # fmt: skip
RESULT = {
    "trained_parameters": 1, "peak_memory_bytes": 2, "artifact_bytes": 3, "train_ms": 4, "final_loss": 0.5,
    "validation_loss": None,
}  # fmt: skip
SPEC = {"strategy": "lora", "dataset_id": "ds-1", "adapter_id": "dates", "config": {"r": 4}, "load": True}
ESTIMATE = {"trained_parameters": 5, "memory_bytes": 6, "artifact_bytes": 7, "total_steps": 9}


def job(job_id: str, state: str, **columns: Any) -> dict[str, Any]:
    usual = {"spec": json.dumps(SPEC), "base_fingerprint": "base", "estimate": json.dumps(ESTIMATE), "engine_losses": 0}
    return {"id": job_id, "state": state, "create_time": MICROSECONDS, **usual, **columns}


def happening(sequence: int, kind: str, **payload: Any) -> dict[str, Any]:
    text = json.dumps({"type": kind} | payload)
    return {"job_id": "job-1", "sequence": sequence, "time": MICROSECONDS + sequence, "kind": kind, "payload": text}


VERSION = {
    "adapter_id": "dates", "strategy": "lora", "base_fingerprint": "base", "size_bytes": 2**40,
    "parameter_count": 2**33, "rank": 8, "create_time": MICROSECONDS,
}  # fmt: skip
ROWS: dict[str, list[dict[str, Any]]] = {
    "adapters": [
        {"id": "dates", "next_number": 4, "create_time": MICROSECONDS},
        {"id": "mood", "next_number": 2, "create_time": MICROSECONDS + 1},
    ],
    "versions": [
        VERSION | {"number": 1, "digest": DIGEST},
        VERSION | {"number": 3, "digest": DIGEST, "tuning_job": "job-1"},
        VERSION | {"adapter_id": "mood", "number": 1, "digest": "sha256:" + "0" * 64, "strategy": "ia3"},
    ],
    "datasets": [
        {
            "id": "ds-1", "display_name": "café.jsonl", "format": "CHAT", "row_count": 3, "size_bytes": 99,
            "create_time": MICROSECONDS,
        }
    ],
    "jobs": [
        job(
            "job-1",
            "SUCCEEDED",
            progress=json.dumps(PROGRESS),
            validation_loss="NaN",
            publication=json.dumps({"digest": DIGEST, "parameter_count": 1, "rank": 8, "result": RESULT}),
            result=json.dumps(RESULT),
            adapter_version="adapters/dates/versions/3",
            start_time=MICROSECONDS + 1,
            end_time=MICROSECONDS + 2,
        ),
        job("job-2", "FAILED", error=json.dumps({"code": "INTERNAL", "reason": "X", "message": "no"}), engine_losses=2),
        job("job-3", "PENDING"),
    ],
    "job_events": [
        happening(1, "StateChanged", state="RUNNING"),
        happening(2, "Progress", progress=PROGRESS),
        happening(3, "Evaluated", step=3, loss=0.25),
        happening(4, "Checkpointed", step=3),
        happening(5, "Note", text="went on"),
    ],
    "requests": [
        {
            "method": "CreateAdapter", "request_id": "r-1", "fingerprint": "f", "resource": "adapters/dates/versions/1",
            "create_time": MICROSECONDS,
        }
    ],
}  # fmt: skip
"""What a server of the first schema has written, in the form in which it wrote it."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of revision 0001 with all of ROWS."""
    path = tmp_path / "registry.db"
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(database_module.__file__).parent / "migrations"))
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0001")
        for table, rows in ROWS.items():
            for row in rows:
                values = ", ".join(f":{column}" for column in row)
                connection.execute(text(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})"), row)
    engine.dispose()
    return path


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    """The same, opened by this server."""
    database = Database.at(path)
    yield database
    database.close()


def test_every_table_had_rows_and_none_is_lost(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert tables - {"alembic_version", "sqlite_sequence"} == set(ROWS)
        assert "pinned" not in [column for _, column, *_ in connection.execute("PRAGMA table_info(versions)")]
    for _ in range(2):  # opened again, it stays as it is
        Database.at(path).close()
        with sqlite3.connect(path) as connection:
            connection.row_factory = sqlite3.Row
            for table, rows in ROWS.items():
                found = [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]
                assert [{key: row[key] for key in of_first} for row, of_first in zip(found, rows, strict=True)] == rows
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    with create_engine(f"sqlite:///{path}").connect() as engine:
        assert compare_metadata(MigrationContext.configure(engine), Base.metadata) == []


def test_versions_can_be_found_pinned_and_deleted(database: Database) -> None:
    registry = Registry(database)
    newest = registry.get_version("dates")
    assert (newest.number, newest.digest, newest.size_bytes, newest.tuning_job) == (3, DIGEST, 2**40, "job-1")
    assert newest.create_time == TIME
    assert [record.name for record in registry.list_adapters()[0]] == [
        "adapters/dates/versions/3",
        "adapters/mood/versions/1",
    ]
    assert registry.pinned_versions() == []
    assert registry.set_pinned(newest, True).pinned
    assert [record.name for record in registry.pinned_versions()] == ["adapters/dates/versions/3"]
    request = RequestKey("CreateAdapter", "r-1", "f")
    found = registry.find_request(request)
    assert found is not None
    assert found.number == 1
    assert [record.number for record in registry.delete_adapter("dates")] == [1, 3]
    assert registry.digests() == {"sha256:" + "0" * 64}


def test_jobs_and_data_sets_go_on(database: Database) -> None:
    no_store: Any = None
    dataset = Datasets(database, no_store).get("ds-1")
    assert (dataset.display_name, dataset.format, dataset.row_count) == ("café.jsonl", DatasetFormat.CHAT, 3)
    jobs = JobRegistry(database)
    done, failed = jobs.get("job-1"), jobs.get("job-2")
    assert done.state is JobState.SUCCEEDED
    assert done.spec.config == {"r": 4}
    assert done.progress == TuningProgress(**PROGRESS)  # type: ignore[arg-type]
    assert done.validation_loss is not None
    assert done.validation_loss != done.validation_loss, "it was NaN"
    assert done.publication is not None
    assert done.publication.result == done.result
    assert (done.create_time, done.adapter_version) == (TIME, "adapters/dates/versions/3")
    assert failed.error is not None
    assert (failed.error.message, failed.engine_losses) == ("no", 2)
    assert [record.job_id for record in jobs.list()[0]] == ["job-3", "job-2", "job-1"]
    assert [record.job_id for record in jobs.unfinished()] == ["job-3"]
    events, ended = jobs.events("job-1", 0, 10)
    assert ended
    assert [record.event for record in events] == [
        StateChanged(state=JobState.RUNNING),
        Progress(progress=TuningProgress(**PROGRESS)),  # type: ignore[arg-type]
        Evaluated(step=3, loss=0.25),
        Checkpointed(step=3),
        Note(text="went on"),
    ]
    assert jobs.record("job-3", [StateChanged(state=JobState.RUNNING)]).state is JobState.RUNNING
