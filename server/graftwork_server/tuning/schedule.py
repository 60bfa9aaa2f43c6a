"""The plan of a training run: how many steps, which rows in which step, which learning rate. Plain arithmetic, seeded;
the same settings give the same plan in every process, which is what makes a resumed run equal to an unbroken one."""

from __future__ import annotations

import functools
import math
import random
from array import array
from collections.abc import Sequence

from graftwork_plugins import TrainingConfig


def held_out_count(row_count: int, fraction: float) -> int:
    """Rows that a validation fraction keeps out of training: at least one, and never the last one to train on."""
    if fraction <= 0 or row_count < 2:
        return 0
    return min(max(1, round(row_count * fraction)), row_count - 1)


def split_rows(row_count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, each in the file's order."""
    held_out = set(random.Random(f"split {seed}").sample(range(row_count), held_out_count(row_count, fraction)))
    return [index for index in range(row_count) if index not in held_out], sorted(held_out)


def steps_per_epoch(config: TrainingConfig, row_count: int) -> int:
    """Optimizer steps of one pass; the last may have fewer rows."""
    return math.ceil(row_count / config.batch_size)


def total_steps(config: TrainingConfig, row_count: int) -> int:
    """Optimizer steps in all, at least 1."""
    if config.max_steps:
        return config.max_steps
    return max(1, math.ceil(config.num_epochs * steps_per_epoch(config, row_count)))


def rows_of_step(config: TrainingConfig, row_count: int, step: int) -> list[int]:
    """Indices of the rows of optimizer step `step` (from 0). Each epoch has its own order."""
    epoch, position = divmod(step, steps_per_epoch(config, row_count))
    order = _epoch_order(row_count, epoch, config.seed)
    return list(order[position * config.batch_size : (position + 1) * config.batch_size])


@functools.lru_cache(maxsize=2)
def _epoch_order(row_count: int, epoch: int, seed: int) -> array[int]:
    order = array("q", range(row_count))
    random.Random(f"epoch {epoch} {seed}").shuffle(order)
    return order


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: a linear rise, then constant, or down to 0 after the
    last step."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_scheduler == "constant":
        return config.learning_rate
    left = (steps - step) / max(1, steps - warmup)
    if config.lr_scheduler == "linear":
        return config.learning_rate * left
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))


def pack(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Positions of `lengths`, in order, in groups of at most `most_tokens`; a longer row is a group of its own."""
    groups: list[list[int]] = []
    filled = 0
    for position, length in enumerate(lengths):
        if not groups or filled + length > most_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(position)
        filled += length
    return groups
