"""One forward of an encoder over the whole sequences of a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch

from graftwork_server.engine.batch import packing_order, spans_of
from graftwork_server.engine.sampling.pooling import collect, head_for
from graftwork_server.engine.scheduling.sequence import ChunkLogits, ScheduledChunk, Sequence
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.encoder_model import EncoderModel
from graftwork_server.layers.routing import Routing


class EncoderRunner:
    """Runs whole sequences, with any mix of adapters, in one forward. Runner's counterpart for encoders."""

    def __init__(self, base: BaseModel) -> None:
        assert isinstance(base.engine_model, EncoderModel)  # the caller chose this runner for it
        self._model = base.engine_model
        self._head = base.head
        self._device = base.device

    def run(self, chunks: SequenceOf[ScheduledChunk]) -> list[ChunkLogits]:
        """Leaves each sequence's state in it; there are no logits."""
        ordered = sorted(chunks, key=packing_order)
        with torch.inference_mode():
            counts = [chunk.count for chunk in ordered]
            states = self._model.states(
                self._tensor(token for chunk in ordered for token in chunk.sequence.tokens),
                self._tensor(position for c in ordered for position in self._model.positions(c.sequence.tokens)),
                self._tensor(kind for chunk in ordered for kind in _token_types(chunk.sequence)),
                [0, *itertools.accumulate(counts)],
                Routing(spans_of(ordered, counts), self._device, self._model.kernels),
            )
            for chunk, part in zip(ordered, states.split(counts), strict=True):
                collect(chunk.sequence, head_for(chunk.sequence, self._head), 0, part)
            self._run_before_heads(ordered)
        nothing = torch.empty(0, 0)
        return [ChunkLogits(chunk, nothing, torch.ones((), dtype=torch.bool)) for chunk in ordered]

    def discard(self, blocks: SequenceOf[int]) -> None:
        """Nothing is left of a sequence with values that are not finite: there are no blocks."""

    def _run_before_heads(self, chunks: SequenceOf[ScheduledChunk]) -> None:
        heads = [head_for(chunk.sequence, self._head) for chunk in chunks]
        counts = [int(head is not None and head.dense_module is not None) for head in heads]
        sequences = [chunk.sequence for chunk, count in zip(chunks, counts, strict=True) if count]
        if not sequences:
            return
        states = torch.stack([sequence.state for sequence in sequences if sequence.state is not None])
        outputs = Routing(spans_of(chunks, counts), self._device, self._model.kernels)
        for sequence, state in zip(sequences, self._model.before_head(states, outputs), strict=True):
            sequence.state = state

    def _tensor(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), device=self._device)


def _token_types(sequence: Sequence) -> SequenceOf[int]:
    pool = sequence.request.pool
    return pool.token_type_ids if pool is not None and pool.token_type_ids else [0] * len(sequence.tokens)
