"""Sequences that want no tokens: one hidden state of the last layer, after the final norm, or what a head makes of it.

They are scheduled, batched and computed as all others. A hook on the model's trunk brings their hidden states; no
logits are made of them. A state is gathered chunk by chunk, so a prompt may take several steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from graftwork_server.engine.sampling.transfer import Array
from graftwork_server.engine.scheduling.sequence import Sequence
from graftwork_server.layers.head import BoundHead
from graftwork_server.layers.models.model import EngineModel
from graftwork_server.wire.engine import Pool, Pooled


@contextmanager
def trunk_states(model: EngineModel, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Within it, a forward of `model` leaves its last hidden states [tokens, hidden] in the list, if `wanted`."""
    states: list[torch.Tensor] = []
    if not wanted:
        yield states
        return

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        states.append(output[0][0])

    handle = model.trunk.register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


def head_for(sequence: Sequence, base_head: BoundHead | None) -> BoundHead | None:
    """The head that answers for the sequence; None if it wants no labels."""
    if not sequence.classifies:
        return None
    return sequence.adapter.head if sequence.adapter else base_head


def collect(sequence: Sequence, head: BoundHead | None, start: int, states: torch.Tensor) -> None:
    """Takes the hidden states [n, hidden] of the sequence's tokens from `start` on, its virtual tokens counted."""
    first = sequence.virtual_tokens
    if start <= first:
        sequence.state = None  # computed anew, perhaps after a preemption
    assert sequence.request.pool is not None  # the caller chose it
    poolings = (head.pooling if head is not None else sequence.request.pool.pooling).split("+")
    states = states.float()
    before = sequence.state if sequence.state is not None else [None] * len(poolings)
    wanted = {"cls": first, "last": _last(sequence, head)}
    so_far = torch.stack(
        [_gathered(*pair, states, start, first, wanted) for pair in zip(poolings, before, strict=True)]
    )  # [poolings, hidden]
    if start + len(states) == len(sequence.tokens):
        weights = _weights(len(sequence.tokens) - first)
        divided = [state / weights.get(pooling, 1.0) for pooling, state in zip(poolings, so_far, strict=True)]
        so_far = torch.cat(divided)
    sequence.state = so_far


def _gathered(
    pooling: str, before: torch.Tensor | None, states: torch.Tensor, start: int, first: int, wanted: dict[str, int]
) -> torch.Tensor:
    """[hidden]: what a pooling had before `start` (None: nothing), and has with `states` [n, hidden] from there."""
    if pooling == "max":
        largest = states.amax(0)
        return largest if before is None else torch.maximum(before, largest)
    if pooling in wanted:
        row = wanted[pooling] - start
        own = states[row] if 0 <= row < len(states) else torch.zeros_like(states[0])
    elif pooling == "weightedmean":
        # Later tokens weigh more: 1, 2, 3 and so on (SGPT, arXiv:2202.08904).
        positions = torch.arange(start - first + 1, start - first + 1 + len(states), device=states.device)
        own = (states * positions[:, None]).sum(0)
    else:
        own = states.sum(0)
    return own if before is None else before + own


def _weights(tokens: int) -> dict[str, float]:
    """What the sums over so many tokens are divided by."""
    return {"mean": tokens, "mean_sqrt_len": math.sqrt(tokens), "weightedmean": tokens * (tokens + 1) / 2}


def _last(sequence: Sequence, head: BoundHead | None) -> int:
    """Position of the last token that is no padding; as in transformers, the first one's if all are."""
    pad = head.pad_token_id if head is not None else None
    first, last = sequence.virtual_tokens, len(sequence.tokens) - 1
    return next((position for position in range(last, first, -1) if sequence.tokens[position] != pad), first)


def vectors(sequences: SequenceOf[Sequence], base_head: BoundHead | None) -> list[torch.Tensor]:
    """What each sequence, whose state is whole, asks for: a vector, or the logits of a head, float32."""
    values: dict[int, torch.Tensor] = {}
    by_head: dict[int, tuple[BoundHead, list[Sequence]]] = {}
    for sequence in sequences:
        assert sequence.state is not None  # collect has seen all its tokens
        assert sequence.request.pool is not None  # the caller chose it
        head = head_for(sequence, base_head)
        if head is None:
            values[sequence.id] = _embedding(sequence.state, sequence.request.pool)
        else:
            by_head.setdefault(id(head), (head, []))[1].append(sequence)
    for head, members in by_head.values():
        logits = head.logits(torch.stack([sequence.state for sequence in members if sequence.state is not None]))
        values.update(zip([sequence.id for sequence in members], logits, strict=True))
    return [values[sequence.id] for sequence in sequences]


def pooled(sequence: Sequence, base_head: BoundHead | None, vector: Array) -> tuple[Pooled, bool]:
    """A sequence's vector as an answer, and whether all its values are finite."""
    head = head_for(sequence, base_head)
    named = sequence.request.pool is not None and sequence.request.pool.names_head
    answer = Pooled(vector.astype("<f4").tobytes(), head.info if head is not None and named else None)
    return answer, bool(np.isfinite(vector).all())


def _embedding(state: torch.Tensor, pool: Pool) -> torch.Tensor:
    vector = state[: pool.dimensions] if pool.dimensions else state
    return torch.nn.functional.normalize(vector, dim=0) if pool.normalize else vector
