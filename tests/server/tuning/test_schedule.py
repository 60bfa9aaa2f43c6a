"""schedule.py: packing, epochs, steps, learning rates and the held-out rows are as documented."""

from __future__ import annotations

import pytest

from graftwork_plugins import TrainingConfig
from graftwork_server.tuning.schedule import held_out_count, learning_rate, pack, rows_of_step, split_rows, total_steps


def test_rows_are_packed_in_order() -> None:
    assert pack([3, 4, 5, 9, 1, 1], 8) == [[0, 1], [2], [3], [4, 5]]
    assert pack([], 8) == []


def test_each_epoch_has_every_row_once_in_its_own_order() -> None:
    config = TrainingConfig(batch_size=4, num_epochs=2, seed=3)
    assert total_steps(config, 10) == 6
    epochs = [[row for step in steps for row in rows_of_step(config, 10, step)] for steps in (range(3), range(3, 6))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(10))


def test_steps() -> None:
    assert total_steps(TrainingConfig(num_epochs=0.5, batch_size=4), 10) == 2
    assert total_steps(TrainingConfig(num_epochs=0.01, batch_size=4), 10) == 1
    assert total_steps(TrainingConfig(max_steps=7), 10) == 7


def test_learning_rates() -> None:
    def course(scheduler: str, warmup: float) -> list[float]:
        config = TrainingConfig(learning_rate=1.0, lr_scheduler=scheduler, warmup_ratio=warmup)  # type: ignore[arg-type]
        return [learning_rate(config, step, 4) for step in range(4)]

    assert course("constant", 0.5) == [0.5, 1, 1, 1]
    assert course("linear", 0) == [1, 0.75, 0.5, 0.25]
    assert course("linear", 0.5) == [0.5, 1, 1, 0.5]
    assert course("cosine", 0) == pytest.approx([1, 0.8536, 0.5, 0.1464], abs=1e-4)


def test_the_split_is_seeded_and_disjoint() -> None:
    kept, held_out = split_rows(20, 0.25, 1)
    assert len(held_out) == held_out_count(20, 0.25) == 5
    assert sorted(kept + held_out) == list(range(20))
    assert split_rows(20, 0.25, 1) == (kept, held_out)
    assert split_rows(20, 0.25, 2) != (kept, held_out)
    assert (held_out_count(20, 0), held_out_count(2, 0.5), held_out_count(1, 0.5), held_out_count(3, 0.01)) == (
        0,
        1,
        0,
        1,
    )
