"""Bars on a terminal."""

from __future__ import annotations

from pathlib import Path

from tests.clients.cli.running import on_terminal
from tests.clients.protos import adapter, event, job, step_event, succeeded
from tests.clients.scripted_server import ScriptedServer

from graftwork.v1 import adapters_pb2 as a
from graftwork.v1 import tuning_pb2 as t


def test_a_terminal_gets_bars(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 2_000_000)
    server.on("CreateAdapter", a.CreateAdapterResponse(adapter=adapter()))
    server.on("GetTuningJob", t.GetTuningJobResponse(job=job()), t.GetTuningJobResponse(job=succeeded()))
    events = [step_event(1, 2), event(2, message="[bold]resumed[/bold]"), event(3, state=t.TUNING_JOB_STATE_SUCCEEDED)]
    server.on("WatchTuningJob", events)
    shown, code = on_terminal(server, "adapter", "create", "dates", str(tmp_path))
    assert code == 0
    assert "2.0" in shown
    assert "published dates@1" in shown
    shown, code = on_terminal(server, "tune", "watch", "j1")
    assert code == 0
    assert "2/3" in shown
    assert "loss 1.5000" in shown
    assert "[bold]resumed[/bold]" in shown
