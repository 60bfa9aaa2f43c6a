"""One forward over the chunks of a step: packing, routing, attention plan, logits."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from graftwork_server.engine.decode_graphs import DecodeSteps
from graftwork_server.engine.sampling.pooling import collect, head_for, trunk_states
from graftwork_server.engine.scheduling.sequence import ScheduledChunk
from graftwork_server.layers.attention.block_kv_cache import AnyKVCache
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS, rows_of
from graftwork_server.layers.attention.paged import Chunk, plan_attention
from graftwork_server.layers.model import EngineModel
from graftwork_server.layers.routing import Routing, RowSpan


@dataclass(frozen=True)
class ChunkLogits:
    """Logits [rows, vocabulary] float32 of a chunk: of all its tokens if the prompt's log probabilities are wanted,
    else of its last token; none of a chunk of virtual tokens alone."""

    chunk: ScheduledChunk
    logits: torch.Tensor
    finite: bool = True
    """None of them is NaN or infinite."""


class Runner:
    """Runs chunks on the base, with any mix of low-rank adapters, and on tuned checkpoints, one forward for each."""

    def __init__(
        self, base: EngineModel, cache: AnyKVCache, device: torch.device, decode_steps: DecodeSteps | None = None
    ) -> None:
        """`decode_steps` runs the base's steps that it can run (decode_graphs.py)."""
        self._decode_steps = decode_steps
        self._base = base
        self._cache = cache
        self._device = device

    def run(self, chunks: SequenceOf[ScheduledChunk]) -> list[ChunkLogits]:
        """Logits of every chunk. Marks nothing as computed: the caller does once it has the results."""
        by_model: dict[int, tuple[EngineModel, list[ScheduledChunk]]] = {}
        for chunk in chunks:
            model = chunk.sequence.adapter.model if chunk.sequence.adapter else None
            model = model or self._base
            by_model.setdefault(id(model), (model, []))[1].append(chunk)
        results: list[ChunkLogits] = []
        with torch.inference_mode():
            for model, members in by_model.values():
                members.sort(key=packing_order)
                logits = self._decode_steps.run(members) if self._decode_steps and model is self._base else None
                if logits is None:
                    results.extend(self._forward(model, members))
                else:
                    logits = logits.float()
                    results.extend(map(ChunkLogits, members, logits.split(1), _are_finite(logits)))
        return results

    def discard(self, blocks: SequenceOf[int]) -> None:
        """Zeroes blocks of a sequence with non-finite logits, before they go to others."""
        with torch.inference_mode():
            rows = rows_of(blocks, 0, BLOCK_TOKENS * len(blocks))
            self._cache.clear(torch.tensor(rows, dtype=torch.int64, device=self._device))

    def _forward(self, model: EngineModel, chunks: list[ScheduledChunk]) -> list[ChunkLogits]:
        input_ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        kept_counts: list[int] = []
        counts: list[int] = []
        to_attend: list[Chunk] = []
        starts: list[int] = []
        lengths: list[int] = []
        for chunk in chunks:
            start, end = self._skip_virtual(chunk), chunk.start + chunk.count
            row, count = len(input_ids), end - start
            starts.append(start)
            counts.append(count)
            if count:
                to_attend.append(Chunk(chunk.sequence.block_table, start, count))
            input_ids.extend(chunk.sequence.tokens[start:end])
            positions.extend(range(start, end))
            lengths.extend([len(chunk.sequence.tokens)] * count)
            if chunk.sequence.wants_prompt_logprobs:
                kept = range(row, row + count)
            else:
                # A row of logits of each chunk, sampled or not, tells whether it was finite.
                count = count if chunk.sequence.request.pool is None else 0
                kept = range(row + max(count - 1, 0), row + count)
            keep.extend(kept)
            kept_counts.append(len(kept))
        if not input_ids:
            return [ChunkLogits(chunk, torch.empty(0, 0)) for chunk in chunks]
        with trunk_states(model, any(chunk.sequence.request.pool is not None for chunk in chunks)) as states:
            logits = model.forward(
                torch.tensor(input_ids, device=self._device),
                torch.tensor(positions, device=self._device),
                torch.tensor(keep, dtype=torch.int64, device=self._device),
                plan_attention(self._cache, to_attend, self._device),
                Routing(spans_of(chunks, counts), self._device, model.kernels, model.triton),
                Routing(spans_of(chunks, kept_counts), self._device, model.kernels, model.triton),
                torch.tensor(lengths, device=self._device) if model.rope_borders else None,
            )
        for of_chunks in states:
            for chunk, start, part in zip(chunks, starts, of_chunks.split(counts), strict=True):
                if chunk.sequence.request.pool is not None and len(part):
                    collect(chunk.sequence, head_for(chunk.sequence, None), start, part)
        logits = logits.float()
        finite = _are_finite(logits)
        results, row = [], 0
        for chunk, part in zip(chunks, logits.split(kept_counts), strict=True):
            results.append(ChunkLogits(chunk, part, all(finite[row : row + len(part)])))
            row += len(part)
        return results

    def _skip_virtual(self, chunk: ScheduledChunk) -> int:
        """Where the chunk's own tokens begin. Its virtual ones are not run: their keys and values are written."""
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
        if start >= sequence.virtual_tokens:
            return start
        own = min(end, sequence.virtual_tokens)
        assert sequence.adapter is not None  # leased while it runs
        assert sequence.adapter.prefix is not None
        rows = torch.tensor(rows_of(sequence.block_table, start, own), device=self._device)
        sequence.adapter.prefix.write(self._cache, start, rows, sequence.rope_regime)
        return own


def _are_finite(logits: torch.Tensor) -> list[bool]:
    """Whether each row of logits [rows, vocabulary] is finite."""
    # A sum costs a fraction of a look at each value; one that is finite had no other terms.
    finite: list[bool] = torch.isfinite(logits.sum(-1)).tolist()
    return finite if all(finite) else torch.isfinite(logits).all(-1).tolist()


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
