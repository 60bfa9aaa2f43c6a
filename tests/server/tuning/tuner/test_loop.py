"""The loop's arithmetic: packing and accumulation do not change the gradient; serving goes first."""

from __future__ import annotations

import os
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bounds import FORWARD_TERMS, assert_near, rounding
from tests.server.tuning.tuner.run_harness import make_run, one_thread, uneven_rows  # noqa: F401 - a fixture

from graftwork_plugins import IGNORED_LABEL, TrainingRow
from graftwork_server.tuning.tuner import loop
from graftwork_server.tuning.tuner.checkpoint import Progressed
from graftwork_server.tuning.tuner.gate import Gate
from graftwork_server.tuning.tuner.loop import Run, evaluate


def gradients(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in run.trainable.parameters.items() if p.grad is not None}


def reference_loss(run: Run, rows: list[TrainingRow]) -> torch.Tensor:
    """Mean loss per token, row by row, without packing."""
    losses = []
    for row in rows:
        logits = run.trainable.model(input_ids=torch.tensor([list(row.input_ids)]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(list(row.labels[1:]))
        losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none"))
    carrying = sum(int((loss != 0).sum()) for loss in losses)
    return torch.cat(losses).sum() / carrying


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 35, 1000])
def test_packing_and_accumulation_change_nothing(tmp_path: Path, micro_batch_tokens: int) -> None:
    run = make_run(tmp_path, micro_batch_tokens=micro_batch_tokens)
    expected = reference_loss(run, uneven_rows())
    expected.backward()
    wanted = gradients(run)
    run.trainable.model.zero_grad()
    loss = loop._accumulate_gradients(run, uneven_rows())
    assert loss == pytest.approx(expected.item(), abs=rounding(expected, FORWARD_TERMS))
    got = gradients(run)
    assert got.keys() == wanted.keys()
    for name in wanted:
        # There and back, through tokens that were summed in another order.
        assert_near(got[name], wanted[name], 2 * FORWARD_TERMS, name)


def test_held_out_loss_is_per_token_and_without_dropout(tmp_path: Path) -> None:
    run = make_run(tmp_path, micro_batch_tokens=20, lora_dropout=0.5)
    training = {name: module.training for name, module in run.trainable.model.named_modules()}
    assert any(training.values())
    measured = evaluate(run).loss
    assert {name: module.training for name, module in run.trainable.model.named_modules()} == training
    run.trainable.model.eval()
    expected = reference_loss(run, uneven_rows())
    assert measured == pytest.approx(expected.item(), abs=rounding(expected, FORWARD_TERMS))


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    loop._accumulate_gradients(run, uneven_rows())
    parameters = list(run.trainable.parameters.values())
    norm = loop._clip_gradients(parameters, 0)
    bound = rounding(norm, sum(parameter.numel() for parameter in parameters))
    assert loop._clip_gradients(parameters, norm / 4) == pytest.approx(norm, abs=bound)
    assert loop._clip_gradients(parameters, 0) == pytest.approx(norm / 4, rel=1e-3)


def test_the_gate_waits_while_serving_runs_and_no_longer_than_allowed() -> None:
    fd = os.memfd_create("gate")
    os.ftruncate(fd, 8)
    gate = Gate(fd, 50)

    def waited() -> float:
        started = time.monotonic()
        gate.wait()
        return time.monotonic() - started

    assert waited() < 0.05
    os.pwrite(fd, struct.pack("=q", 2), 0)
    assert gate.busy
    assert waited() >= 0.05


def test_evaluation_waits_while_serving_runs(tmp_path: Path) -> None:
    fd = os.memfd_create("gate")
    os.ftruncate(fd, 8)
    os.pwrite(fd, struct.pack("=q", 1), 0)
    run = replace(make_run(tmp_path, micro_batch_tokens=20), gate=Gate(fd, 600_000))
    measured: list[float] = []
    thread = threading.Thread(target=lambda: measured.append(evaluate(run).loss), daemon=True)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    os.pwrite(fd, struct.pack("=q", 0), 0)
    thread.join(60)
    assert measured == [pytest.approx(reference_loss(run, uneven_rows()).item(), abs=1e-5)]


def test_evaluation_gives_way_before_each_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    loss = loop._loss
    monkeypatch.setattr(loop, "_loss", lambda *arguments: order.append("forward") or loss(*arguments))
    monkeypatch.setattr(Gate, "wait", lambda self: order.append("wait"))
    fd = os.memfd_create("gate")
    os.ftruncate(fd, 8)
    evaluate(replace(make_run(tmp_path, micro_batch_tokens=20), gate=Gate(fd, 0)))
    assert len(order) >= 6
    assert order == ["wait", "forward"] * (len(order) // 2)


def test_rates_are_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    state = Progressed(step=7, seen_tokens=1000, train_ms=500)
    clock = loop._Clock(state, steps=147)

    def steps(count: int, seconds: float) -> Any:
        for _ in range(count):
            now[0] += seconds
            state.step, state.seen_tokens = state.step + 1, state.seen_tokens + 100
            progress = clock.progress(loss=1.0, rate=0.1)
        return progress

    first = steps(1, 2.0)
    assert (first.tokens_per_second, first.eta_ms) == (50, 139 * 2000)
    # Serving has taken the machine for a while: the first steps of the run say nothing about the time left.
    slow = steps(39, 10.0)
    assert (slow.tokens_per_second, slow.eta_ms) == (10, 100 * 10_000)
    fast = steps(20, 0.5)
    assert (fast.tokens_per_second, fast.eta_ms) == (200, 80 * 500)
    assert state.train_ms == 500 + 2000 + 390_000 + 10_000
