"""What commands print: JSON, columns, and nothing that steers a terminal."""

from __future__ import annotations

from typing import Any

from tests.clients.cli.running import objects, on_terminal, start_and_read
from tests.clients.protos import last, piece
from tests.clients.scripted_server import ScriptedServer

from graftwork.v1 import generation_pb2 as g
from graftwork.v1 import tuning_pb2 as t


def test_numbers_that_json_does_not_know(server: ScriptedServer, run: Any) -> None:
    server.on("Score", g.ScoreResponse(total_logprob=float("-inf")))
    assert objects(run("score", "base", "x", "--json"))[0]["total_logprob"] is None


def test_a_terminal_is_not_steered_by_the_answer(server: ScriptedServer) -> None:
    server.on("Generate", [piece("a\x1b]0;owned\x07b\n", 1), last()])
    shown, code = on_terminal(server, "generate", "base", "hi")
    assert code == 0
    assert "\x1b]0;" not in shown
    assert "\ufffd]0;owned\ufffdb" in shown


def test_a_narrow_terminal_gets_long_values_below_each_other(server: ScriptedServer) -> None:
    spec = t.TuningJobSpec(strategy="lora", adapter_id="dates")
    spec.config.update({f"setting_{number}": number for number in range(30)})
    server.on("GetTuningJob", t.GetTuningJobResponse(job=t.TuningJob(job_id="j1", spec=spec)))
    shown, code = on_terminal(server, "tune", "show", "j1")
    assert code == 0
    lines = shown.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 120
    start = next(index for index, line in enumerate(lines) if line.startswith("settings "))
    assert lines[start + 1].startswith(" " * 10 + "setting_")
    plain, _ = start_and_read(server, "tune", "show", "j1")
    assert sum(line.startswith("settings ") and "setting_9=9" in line for line in plain.splitlines()) == 1
