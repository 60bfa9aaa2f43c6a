"""Training as the host does it, in its shortest form: rows to learn from, and steps of AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graftwork_plugins import IGNORED_LABEL, Strategy, Trainable, TrainingRow
from graftwork_plugins.testing.models import CPU


def make_rows(count: int = 8, length: int = 12, vocabulary: int = 64) -> list[TrainingRow]:
    """Rows with a regularity to learn; the first third of each carries no loss."""
    rows = []
    for index in range(count):
        ids = [(3 * index + 5 * position) % vocabulary for position in range(length)]
        prompt = length // 3
        rows.append(TrainingRow(ids, [IGNORED_LABEL] * prompt + ids[prompt:]))
    return rows


def train_steps(
    strategy: Strategy, trainable: Trainable, rows: Sequence[TrainingRow], steps: int, learning_rate: float
) -> list[float]:
    """A plain AdamW loop over one batch of `rows`; the mean loss per token of each step."""
    optimizer = torch.optim.AdamW(list(trainable.parameters.values()), lr=learning_rate, weight_decay=0.0)
    carrying = sum(label != IGNORED_LABEL for row in rows for label in row.labels[1:])
    losses: list[float] = []
    for _ in range(steps):
        loss = strategy.loss(trainable, strategy.collate(rows, CPU)) / carrying
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses
