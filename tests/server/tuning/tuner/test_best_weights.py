"""The best weights by held-out loss: training stops when it rises, they survive kills, they are published."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.server.tuning.tuner.run_harness import make_run, one_thread  # noqa: F401 - a fixture

from graftwork_plugins import IGNORED_LABEL, TrainingRow
from graftwork_server.tuning.tuner import loop
from graftwork_server.tuning.tuner.checkpoint import Progressed
from graftwork_server.tuning.tuner.loop import Measurement, Run, evaluate, train
from graftwork_server.wire.tuning import Checkpointed, Evaluated, Note, Progress, TunerEvent

SETTINGS: dict[str, Any] = {
    "max_steps": 30,
    "batch_size": 3,
    "learning_rate": 0.05,
    "lora_dropout": 0.2,
    "eval_steps": 2,
    "checkpoint_steps": 3,
    "early_stopping_patience": 3,
    "published_weights": "best",
}


class Killed(Exception):
    """The process ends here."""


def other_rows() -> list[TrainingRow]:
    """Like the first of uneven_rows in the beginning and unlike them later, so that learning those soon does harm."""
    ids = [(7 * index) % 60 for index in range(20)]
    return [TrainingRow(ids, [IGNORED_LABEL, *ids[1:]])]


def prepared(folder: Path, **settings: Any) -> tuple[Run, list[TunerEvent]]:
    run = make_run(folder, **(SETTINGS | settings))
    events: list[TunerEvent] = []
    return telling(replace(run, held_out=other_rows()), events.append), events


def telling(run: Run, send: Callable[[TunerEvent], None]) -> Run:
    """The run with another listener."""
    run.reports._send = send
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.trainable.parameters.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Held-out losses as given by the test; beside each, the weights that were measured."""
    measured: list[tuple[float, dict[str, torch.Tensor]]] = []
    losses = iter([3.0, 2.0, 2.5, 1.5, 1.6, 1.5, 1.7, 0.1])

    def evaluate(run: Run) -> Measurement:
        measured.append((next(losses), weights(run)))
        return Measurement([measured[-1][0]], 1)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    return measured


def test_training_stops_and_the_best_is_taken(tmp_path: Path, scripted: Any) -> None:
    run, events = prepared(tmp_path)
    state = train(run)
    # 1.5 at step 8, then three that are not lower; the 0.1 after them is never seen.
    assert (state.step, state.best_step, state.published_step, state.validation_loss) == (14, 8, 8, 1.5)
    assert len(scripted) == 7
    assert same(weights(run), scripted[3][1])
    texts = [event.text for event in events if isinstance(event, Note)]
    assert texts == [
        "stopped after step 14 of 30: since step 8 the held-out loss has risen",
        "the weights of step 8 are published: their held-out loss is 1.5000, that of the last ones 1.7000",
    ]
    assert [event.progress.total_steps for event in events if isinstance(event, Progress)] == [30] * 14


def test_without_patience_all_steps_are_done(tmp_path: Path, scripted: Any) -> None:
    run, _ = prepared(tmp_path, early_stopping_patience=0, max_steps=14)
    state = train(run)
    assert (state.step, state.published_step) == (14, 8)
    assert same(weights(run), scripted[3][1])


def test_the_last_weights_are_published_as_they_are(tmp_path: Path, scripted: Any) -> None:
    run, events = prepared(tmp_path, published_weights="last", early_stopping_patience=0, max_steps=14)
    state = train(run)
    assert (state.step, state.published_step, state.validation_loss) == (14, 14, 1.7)
    assert same(weights(run), scripted[6][1])
    assert not list(tmp_path.glob("best-*"))
    assert not [event for event in events if isinstance(event, Note)]


def test_what_chance_explains_is_as_good() -> None:
    lowest = [1.0] * 10
    one_row_up = Measurement([0.9] * 9 + [3.0], 10)  # the mean rises by 0.11, since one row in ten does
    assert one_row_up.loss > 1.1
    assert one_row_up.as_good_as(lowest)
    assert not Measurement([1.1] * 10, 10).as_good_as(lowest), "each row is worse"
    assert not Measurement([1.0] * 4 + [3.0] * 6, 10).as_good_as(lowest), "most rows are worse"
    assert not Measurement([1.1], 1).as_good_as([1.0]), "of one row nothing is known"
    assert not Measurement([0.9] * 9 + [math.inf], 10).as_good_as(lowest)
    assert not Measurement([0.9] * 9 + [math.nan], 10).as_good_as(lowest)


def test_later_weights_that_are_as_good_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they are compared with the lowest loss, not with each other: small steps up do not add up to a large one."""
    losses = iter([[2.0, 2.0], [1.0, 1.0], [0.5, 1.6], [0.4, 1.9], [1.6, 1.6], [1.7, 1.7], [1.8, 1.8], [9.0, 9.0]])
    monkeypatch.setattr(loop, "evaluate", lambda run: Measurement(next(losses), 2))
    run, _ = prepared(tmp_path)
    state = train(run)
    assert (state.lowest_loss, state.best_loss, state.best_step) == (1.0, 1.15, 8)
    assert (state.step, state.published_step, state.validation_loss) == (14, 8, 1.15)


def test_a_measurement_is_of_every_row(tmp_path: Path) -> None:
    run, _ = prepared(tmp_path)
    for count in (1, 10, 16, 40):
        many = replace(run, held_out=[row for _ in range(count) for row in other_rows()])
        measured = evaluate(many)
        assert len(measured.losses) == {1: 1, 10: 10, 16: 16, 40: 20}[count]
        assert measured.loss == pytest.approx(evaluate(run).loss, rel=1e-5)


def test_damaged_best_weights_are_said(tmp_path: Path, scripted: Any) -> None:
    run, events = prepared(tmp_path, max_steps=14, early_stopping_patience=0)

    def send(event: TunerEvent) -> None:
        events.append(event)
        if isinstance(event, Evaluated) and event.step == 8:
            (tmp_path / "best-00000008" / "tensors.safetensors").write_bytes(b"not these")

    state = train(telling(run, send))
    assert (state.published_step, state.validation_loss) == (14, 1.7)
    assert events[-1] == Note(text="the weights of step 8, the best, are damaged; the last are published")


def test_only_best_weights_that_are_needed_are_kept(tmp_path: Path) -> None:
    run, _ = prepared(tmp_path, early_stopping_patience=0)
    kept: list[int] = []

    def send(event: TunerEvent) -> None:
        if isinstance(event, Evaluated | Checkpointed):
            kept.append(len(list(tmp_path.glob("best-*"))))

    train(telling(run, send))
    assert 1 <= max(kept) <= 3


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Progressed, dict[str, torch.Tensor], list[TunerEvent]]:
    """A run to its end. It stops early, or its resumption would show little."""
    run, events = prepared(tmp_path_factory.mktemp("unbroken"))
    state = train(run)
    assert 6 <= state.step < 30
    assert 0 < state.published_step < state.step
    return state, weights(run), events


@pytest.mark.parametrize("before", ["progress", "evaluated", "checkpointed"])
@pytest.mark.parametrize("nth", [2, 3, 4])
def test_a_killed_run_ends_as_an_unbroken_one(
    tmp_path: Path, unbroken: tuple[Progressed, dict[str, torch.Tensor], list[TunerEvent]], before: str, nth: int
) -> None:
    """Killed as it says the nth event of a kind: what was durable before is there."""
    kind: type[Any] = {"progress": Progress, "evaluated": Evaluated, "checkpointed": Checkpointed}[before]
    first, seen = prepared(tmp_path)

    def send(event: TunerEvent) -> None:
        seen.append(event)
        if sum(isinstance(said, kind) for said in seen) == nth:
            raise Killed

    with pytest.raises(Killed):
        train(telling(first, send))
    second, events = prepared(tmp_path)
    state = train(second)
    whole, theirs, told = unbroken
    assert same(weights(second), theirs)
    fields = [name for name in Progressed.__struct_fields__ if name != "train_ms"]
    assert [getattr(state, name) for name in fields] == [getattr(whole, name) for name in fields]
    mine, all_of_them = ([event for event in of if isinstance(event, Evaluated)] for of in (events, told))
    assert mine == all_of_them[len(all_of_them) - len(mine) :]


def test_a_run_that_had_stopped_does_not_train_on(tmp_path: Path) -> None:
    """The checkpoint is of the very step at which it stopped."""
    run, _ = prepared(tmp_path, eval_steps=3, early_stopping_patience=1)
    state = train(run)
    assert state.step < 30
    assert (tmp_path / f"step-{state.step:08}").is_dir()
    again, events = prepared(tmp_path, eval_steps=3, early_stopping_patience=1)
    resumed = train(again)
    assert not [event for event in events if isinstance(event, Progress)]
    assert (resumed.step, resumed.published_step) == (state.step, state.published_step)
    assert same(weights(again), weights(run))


def test_an_older_checkpoint_finds_its_best_weights(tmp_path: Path, unbroken: Any) -> None:
    """The newest checkpoint is damaged, and the run goes on from the one before."""
    first, seen = prepared(tmp_path)

    def send(event: TunerEvent) -> None:
        seen.append(event)
        if isinstance(event, Checkpointed) and event.step == 9:
            raise Killed

    with pytest.raises(Killed):
        train(telling(first, send))
    newest = max(tmp_path.glob("step-*"))
    shutil.rmtree(newest)
    second, _ = prepared(tmp_path)
    train(second)
    assert same(weights(second), unbroken[1])
