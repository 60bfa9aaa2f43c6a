"""The forwards of a step: one for each model that its chunks need."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from graftwork_server.engine.batch import Batch, PackedChunk, packing_order, spans_of
from graftwork_server.engine.decode_graphs import DecodeSteps
from graftwork_server.engine.sampling.pooling import collect, head_for, trunk_states
from graftwork_server.engine.scheduling.sequence import ChunkLogits, ScheduledChunk
from graftwork_server.layers.attention.block_kv_cache import AnyKVCache
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS, rows_of
from graftwork_server.layers.attention.paged import plan_attention
from graftwork_server.layers.models.model import EngineModel
from graftwork_server.layers.routing import Routing


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
                    results.extend(_by_chunk(members, logits.float(), [1] * len(members)))
        return results

    def discard(self, blocks: SequenceOf[int]) -> None:
        """Zeroes blocks of a sequence with non-finite logits, before they go to others."""
        with torch.inference_mode():
            rows = rows_of(blocks, 0, BLOCK_TOKENS * len(blocks))
            self._cache.clear(torch.tensor(rows, dtype=torch.int64, device=self._device))

    def _forward(self, model: EngineModel, chunks: list[ScheduledChunk]) -> list[ChunkLogits]:
        batch = Batch([PackedChunk(chunk, self._skip_virtual(chunk)) for chunk in chunks], self._device)
        if batch.is_empty:
            nothing = torch.empty(0, 0, device=self._device)
            return [ChunkLogits(chunk, nothing, _is_finite(nothing)) for chunk in chunks]
        with trunk_states(model, batch.pools) as states:
            logits = model.forward(
                batch.input_ids(),
                batch.position_ids(),
                batch.logit_indices(),
                plan_attention(self._cache, batch.cache_chunks(), self._device),
                Routing(spans_of(chunks, batch.rows), self._device, model.kernels, model.triton),
                Routing(spans_of(chunks, batch.logit_rows), self._device, model.kernels, model.triton),
                batch.lengths() if model.rope_borders else None,
            )
        for of_chunks in states:
            for packed, part in zip(batch.chunks, of_chunks.split(batch.rows), strict=True):
                sequence = packed.chunk.sequence
                if sequence.request.pool is not None and len(part):
                    collect(sequence, head_for(sequence, None), packed.start, part)
        return _by_chunk(chunks, logits.float(), batch.logit_rows)

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


def _by_chunk(chunks: SequenceOf[ScheduledChunk], logits: torch.Tensor, rows: list[int]) -> list[ChunkLogits]:
    """Logits [rows of all chunks, vocabulary] float32, cut into the chunks'."""
    finite = _finite_rows(logits)
    parts = zip(chunks, logits.split(rows), finite.split(rows), strict=True)
    return [ChunkLogits(chunk, part, flags[0] if len(flags) == 1 else flags.all()) for chunk, part, flags in parts]


def _finite_rows(logits: torch.Tensor) -> torch.Tensor:
    """Whether each row of logits [rows, vocabulary] is finite: [rows] bool."""
    if logits.device.type == "cpu":
        # A sum costs a fraction of a look at each value; one that is finite had no other terms.
        finite = torch.isfinite(logits.sum(-1))
        if finite.all():
            return finite
    return torch.isfinite(logits).all(-1)


def _is_finite(logits: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(logits).all()
