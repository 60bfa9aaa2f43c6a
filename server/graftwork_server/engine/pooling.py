"""Sequences that want no tokens: one hidden state of the last layer, after the final norm, or what a head makes of it.

They are scheduled, batched and computed as all others. A hook on the model's trunk brings their hidden states; no
logits are made of them. A state is gathered chunk by chunk, so a prompt may take several steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graftwork_server.engine.heads import BoundHead
from graftwork_server.engine.model import EngineModel
from graftwork_server.engine.sequence import Sequence
from graftwork_server.messages import Pool, Pooled, SequenceOutput

POOLINGS = ("mean", "cls", "last")


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
    pooling = head.pooling if head is not None else sequence.request.pool.pooling
    if pooling == "mean":
        total = states.float().sum(0)
        sequence.state = total if sequence.state is None else sequence.state + total
        if start + len(states) == len(sequence.tokens):
            sequence.state = sequence.state / (len(sequence.tokens) - first)
        return
    wanted = first if pooling == "cls" else _last(sequence, head)
    if start <= wanted < start + len(states):
        sequence.state = states[wanted - start].to(torch.float32, copy=True)


def _last(sequence: Sequence, head: BoundHead | None) -> int:
    """Position of the last token that is no padding; as in transformers, the first one's if all are."""
    pad = head.pad_token_id if head is not None else None
    first, last = sequence.virtual_tokens, len(sequence.tokens) - 1
    return next((position for position in range(last, first, -1) if sequence.tokens[position] != pad), first)


def answers(sequences: SequenceOf[Sequence], base_head: BoundHead | None) -> list[SequenceOutput | None]:
    """The last output of each sequence, whose state is whole; None where values are not finite."""
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
    outputs: list[SequenceOutput | None] = []
    for sequence in sequences:
        vector, head = values[sequence.id].cpu(), head_for(sequence, base_head)
        named = sequence.request.pool is not None and sequence.request.pool.names_head
        pooled = Pooled(vector.numpy().astype("<f4").tobytes(), head.info if head is not None and named else None)
        finite = bool(torch.isfinite(vector).all())
        outputs.append(SequenceOutput(sequence.id, [], "stop", pooled=pooled) if finite else None)
    return outputs


def _embedding(state: torch.Tensor, pool: Pool) -> torch.Tensor:
    vector = state[: pool.dimensions] if pool.dimensions else state
    return torch.nn.functional.normalize(vector, dim=0) if pool.normalize else vector


def default_pooling(source: str, otherwise: str) -> str:
    """What sentence-transformers' 1_Pooling/config.json in the model's directory says, if that is served."""
    file = Path(source) / "1_Pooling" / "config.json"
    try:
        document = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return otherwise
    names = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
    chosen = [pooling for name, pooling in names.items() if document.get(f"pooling_mode_{name}") is True]
    chosen = chosen or [names.get(str(document.get("pooling_mode")), str(document.get("pooling_mode")))]
    return chosen[0] if len(chosen) == 1 and chosen[0] in POOLINGS else otherwise
