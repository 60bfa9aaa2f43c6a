"""The losses of a job as a line of blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from tests.clients.cli.running import on_terminal, start
from tests.clients.protos import event, job, succeeded
from tests.clients.scripted_server import ScriptedServer

from graftwork.cli.loss_curve import LossCurve, sparkline
from graftwork.types import TuningEvent, TuningProgress
from graftwork.v1 import tuning_pb2 as t


def test_a_terminal_keeps_the_loss_curve(server: ScriptedServer) -> None:
    def step(number: int) -> t.WatchTuningJobResponse:
        loss = 4.0 - number / 50
        progress = t.TuningProgress(step=number, total_steps=100, loss=loss, learning_rate=1e-4, eta_ms=1000)
        return event(number, progress=progress)

    server.on("GetTuningJob", t.GetTuningJobResponse(job=job()), t.GetTuningJobResponse(job=succeeded()))
    server.on(
        "WatchTuningJob", [*map(step, range(1, 101)), event(101, evaluation=t.TuningEvaluation(step=100, loss=2))]
    )
    shown, code = on_terminal(server, "tune", "watch", "j1")
    assert code == 0
    assert [int(step) for step in re.findall(r"step (\d+)(?:/100)?  ", shown)] == [*range(1, 101, 5), 100, 100]
    assert "loss           3.9800 █" in shown
    assert "▁ 2.0000  (steps 1 to 100)" in shown
    server.on("GetTuningJob", t.GetTuningJobResponse(job=job()), t.GetTuningJobResponse(job=succeeded()))
    plain, _ = start(server, "tune", "watch", "j1", env={"PYTHONIOENCODING": "utf-8"}).communicate(timeout=20)
    assert plain.count(b"\nstep ") == 100
    assert "█".encode() in plain


def test_a_long_curve_is_kept_in_little_memory() -> None:
    def steps(count: int) -> Iterator[TuningEvent]:
        for step in range(1, count + 1):
            progress = TuningProgress(step, count, 5.0 - 4 * step / count, 0.0, 0.0, 0, 0)
            yield TuningEvent(sequence=step, time=None, kind="progress", progress=progress)

    curve = LossCurve()
    assert sum(1 for _ in curve.watch(steps(60_000))) == 60_000
    assert len(curve._training) <= 5_001
    assert curve._training[-1] == (60_000, 1.0)
    drawn = sparkline([value for _, value in curve._training])
    assert len(drawn) == 50
    assert drawn == "".join(sorted(drawn, reverse=True))
    assert [drawn.count(block) for block in "▇▆▅▄▃▂"] == pytest.approx([7] * 6, abs=1)
