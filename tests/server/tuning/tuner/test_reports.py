"""reports.py: what a killed front did not write down is reported again, what it did write is not kept twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.server.tuning.jobs.scripted import step
from tests.server.tuning.tuner.run_harness import make_run

from graftwork_server.tuning.tuner.loop import train
from graftwork_server.tuning.tuner.reports import Reports
from graftwork_server.wire.tuning import Checkpointed, Evaluated, Note, Progress, TunerEvent


def steps(events: list[TunerEvent]) -> list[int]:
    return [event.progress.step for event in events if isinstance(event, Progress)]


def test_a_run_that_goes_on_says_again_what_its_checkpoint_knows(tmp_path: Path) -> None:
    first: list[TunerEvent] = []
    before = Reports(tmp_path / "reports", first.append)
    for event in (step(1), Note(text="not kept"), step(2), Evaluated(step=2, loss=float("nan"))):
        before.send(event)
    before.keep(2)
    before.send(step(3))
    before.keep(3)  # but its checkpoint was not finished: the step is done again
    assert steps(first) == [1, 2, 3]

    again: list[TunerEvent] = []
    after = Reports(tmp_path / "reports", again.append, reported_step=2)
    after.go_on(2)
    assert steps(again) == [2]
    evaluated = again[1]
    assert isinstance(evaluated, Evaluated)
    assert (evaluated.step, evaluated.loss != evaluated.loss) == (2, True)
    assert again[2:] == [Checkpointed(step=2)]
    after.send(step(3))
    after.keep(3)
    third: list[TunerEvent] = []
    Reports(tmp_path / "reports", third.append, 0).go_on(3)
    assert steps(third) == [1, 2, 3]
    third.clear()
    Reports(tmp_path / "reports", third.append).go_on(3)
    assert third == []


@pytest.mark.parametrize("reported", [0, 1, 4, 6])
def test_a_broken_off_run_leaves_no_hole(tmp_path: Path, reported: int) -> None:
    """The front has what it had written, and the tuner died in its seventh step, after the checkpoint of the fourth."""
    written: list[TunerEvent] = []

    def die(event: TunerEvent) -> None:
        if isinstance(event, Progress) and event.progress.step == 7:
            raise ConnectionError
        written.append(event)

    settings = {"max_steps": 10, "checkpoint_steps": 4, "eval_steps": 2, "batch_size": 2}
    run = make_run(tmp_path, **settings)
    object.__setattr__(run, "reports", Reports(tmp_path / "reports", die))
    with pytest.raises(ConnectionError):
        train(run)
    kept = [event for event in written if isinstance(event, Progress) and event.progress.step <= reported]

    rest: list[TunerEvent] = []
    run = make_run(tmp_path, **settings)
    object.__setattr__(run, "reports", Reports(tmp_path / "reports", rest.append, reported))
    train(run)
    assert sorted({*steps(list(kept)), *steps(rest)}) == list(range(1, 11))
    evaluated = {event.step for event in rest if isinstance(event, Evaluated)}
    assert evaluated >= {number for number in range(2, 11, 2) if number > reported}
    losses = {event.progress.step: event.progress.loss for event in rest if isinstance(event, Progress)}
    for event in written:
        if isinstance(event, Progress) and event.progress.step in losses:
            assert losses[event.progress.step] == event.progress.loss
