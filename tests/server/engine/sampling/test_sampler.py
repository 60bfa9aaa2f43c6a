"""Sampling a whole batch: each row as by itself, and one wait for the device."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from tests.server.engine.sampling.sampling_harness import sample
from torch.overrides import TorchFunctionMode

from graftwork_server.engine.sampling import draw
from graftwork_server.engine.sampling.sampler import Sampler
from graftwork_server.engine.sampling.transfer import Readback
from graftwork_server.engine.scheduling.sequence import ChunkLogits, ScheduledChunk, Sequence
from graftwork_server.wire.engine import Generate, Sampling

VOCABULARY = 3000
CUTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    *(
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
        for temperature, top_k, top_p, min_p, typical_p in itertools.product(
            (0.7,), (0, 3, 1024), (1.0, 0.6), (0.0, 0.05), (1.0, 0.8)
        )
    ),
]


def sequences(count: int = 1) -> list[Sequence]:
    made = []
    for seed, asked in enumerate(CUTS * count):
        request = Generate(id=seed + 1, prompt_ids=[1], sampling=Sampling(max_tokens=9, seed=seed, logprobs=2, **asked))
        made.append(Sequence.of(request))
    return made


def some_logits(rows: int) -> torch.Tensor:
    # Few different values, so that there are ties everywhere.
    return torch.randint(-20, 20, (rows, VOCABULARY), generator=torch.Generator().manual_seed(1)) / 4


def test_each_row_is_as_by_itself() -> None:
    logits = some_logits(len(CUTS))
    together = sample(logits.clone(), sequences())
    alone = [sample(row[None].clone(), [one])[0] for row, one in zip(logits, sequences(), strict=True)]
    backwards = sample(logits.flip(0).clone(), sequences()[::-1])
    assert together == alone == backwards[::-1]


def test_all_rows_at_once_draw_what_rows_draw_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, on the CPU: its candidates are the whole vocabulary, by a stable sort."""
    logits = torch.randn(len(CUTS), VOCABULARY, generator=torch.Generator().manual_seed(2)) * 3  # no ties
    asked = [one.request.sampling for one in sequences()][1:]
    rows, us = list(range(1, len(CUTS))), [(7 * row + 3) % 100 / 100 for row in range(1, len(CUTS))]
    one_by_one = draw.draw(logits, rows, asked, us)

    monkeypatch.setattr(draw, "_is_host", lambda tensor: False)
    assert draw.draw(logits, rows, asked, us).tolist() == one_by_one.tolist()


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS and sys._getframe(1).f_code.co_name != "_argmax":  # which asks which device it is on
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "_is_host", lambda tensor: False)
    logits = some_logits(len(CUTS))
    finite = torch.isfinite(logits).all(-1)
    results = [
        ChunkLogits(ScheduledChunk(one, 0, 1), row[None], flag)
        for one, row, flag in zip(sequences(), logits, finite, strict=True)
    ]
    sampler = Sampler(None)
    reads: list[int] = []
    read = Readback.read

    def counted(self: Any) -> Any:
        reads.append(len(waits.found))
        values = read(self)
        waits.found.clear()
        return values

    monkeypatch.setattr(Readback, "read", counted)
    with Waits() as waits:
        sampled = sampler.sample(results)
    assert reads == [0]  # nothing was read before
    assert waits.found == []  # nor after
    assert all(one.token is not None and one.logprobs for one in sampled)
