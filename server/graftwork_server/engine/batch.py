"""The rows of one forward: chunks of sequences, packed one after another."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from graftwork_server.engine.scheduling.sequence import ScheduledChunk
from graftwork_server.layers.attention.paged import Chunk
from graftwork_server.layers.routing import RowSpan


@dataclass(frozen=True)
class PackedChunk:
    """A chunk's rows in a batch."""

    chunk: ScheduledChunk
    start: int
    """Position of its first token that is run; virtual ones before it are written to the cache instead."""

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.chunk.start + self.chunk.count

    @property
    def rows(self) -> int:
        """How many tokens are run."""
        return self.end - self.start

    @property
    def logit_rows(self) -> int:
        """How many of its rows, the last ones, logits are made of: all of a prompt whose log probabilities are wanted,
        none of a sequence that wants a vector; else one, sampled or not, which tells whether it was finite."""
        if self.chunk.sequence.wants_prompt_logprobs:
            return self.rows
        return min(self.rows, 1) if self.chunk.sequence.request.pool is None else 0


class Batch:
    """Chunks that are run together, in the order in which their rows stand."""

    def __init__(self, chunks: SequenceOf[PackedChunk], device: torch.device) -> None:
        self.chunks = chunks
        self.device = device
        self.rows = [packed.rows for packed in chunks]
        """Of each chunk."""
        self.logit_rows = [packed.logit_rows for packed in chunks]
        """Of each chunk."""

    @property
    def is_empty(self) -> bool:
        """There is nothing to run."""
        return not any(self.rows)

    @property
    def pools(self) -> bool:
        """Some sequence wants a vector."""
        return any(packed.chunk.sequence.request.pool is not None for packed in self.chunks)

    def input_ids(self) -> torch.Tensor:
        """[rows] int64"""
        return self._tensor([id for p in self.chunks for id in p.chunk.sequence.tokens[p.start : p.end]])

    def position_ids(self) -> torch.Tensor:
        """[rows] int64"""
        return self._tensor([position for p in self.chunks for position in range(p.start, p.end)])

    def lengths(self) -> torch.Tensor:
        """[rows] int64: how long the sequence of each row is."""
        return self._tensor([length for p in self.chunks for length in [len(p.chunk.sequence.tokens)] * p.rows])

    def logit_indices(self) -> torch.Tensor:
        """[rows with logits] int64: which rows logits are made of."""
        logit_indices: list[int] = []
        end = 0
        for rows, logit_rows in zip(self.rows, self.logit_rows, strict=True):
            end += rows
            logit_indices.extend(range(end - logit_rows, end))
        return self._tensor(logit_indices)

    def cache_chunks(self) -> list[Chunk]:
        """What of the KV cache the rows belong to."""
        return [Chunk(p.chunk.sequence.block_table, p.start, p.rows) for p in self.chunks if p.rows]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def packing_order(chunk: ScheduledChunk) -> tuple[int, int, int]:
    """Decodes before prefills, then by slot, so that the rows of neighbouring slots stand together."""
    adapter = chunk.sequence.adapter
    if adapter is None or adapter.block is None:
        return (chunk.count > 1, 0, 0)
    return (chunk.count > 1, id(adapter.block), adapter.slot)


def spans_of(chunks: SequenceOf[ScheduledChunk], counts: SequenceOf[int]) -> list[RowSpan]:
    """Rows of each adapter when every chunk has `counts` rows; neighbours of one adapter become one span."""
    spans: list[RowSpan] = []
    last, row = None, 0
    for chunk, count in zip(chunks, counts, strict=True):
        adapter = chunk.sequence.adapter
        if adapter is not None and count:
            start = row
            if adapter is last and spans[-1].end == row:
                start = spans.pop().start
            spans.append(RowSpan(start, row + count, adapter.block, adapter.slot, adapter.changes))
            last = adapter
        row += count
    return spans
