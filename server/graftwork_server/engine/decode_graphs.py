"""Decode steps replayed as CUDA graphs: one launch for a whole forward, instead of one for each of its operations.

A captured forward reads its input from buffers whose addresses stay: token ids, positions, block tables, and which rows
belong to which adapter's slot. So one graph serves any sequences and any mix of adapters; it is captured for a number
of rows (those that are not needed are computed and thrown away) and for the most ranks that its adapters may have.

Everything but the capture itself runs on any device, and is tested without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graftwork_server.engine.scheduling.sequence import ScheduledChunk
from graftwork_server.layers.attention.block_kv_cache import AnyKVCache, BlockKVCache, DecodingRows
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.layers.attention.paged import AttentionPlan
from graftwork_server.layers.models.model import EngineModel
from graftwork_server.layers.routing import Routing

if TYPE_CHECKING:
    from graftwork_server.kernels.triton.kernels import TritonKernels

log = logging.getLogger("graftwork.engine")

_ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that forwards are captured for. Larger batches keep the device busy without graphs."""


def row_counts(most: int) -> list[int]:
    """Those that batches of up to `most` rows need."""
    needed = sum(count < most for count in _ROW_COUNTS) + 1
    return list(_ROW_COUNTS[:needed])


def is_replayable(chunk: ScheduledChunk) -> bool:
    """Whether a graph can compute this chunk: one token that is sampled from, of the base or with low-rank updates."""
    sequence = chunk.sequence
    adapter = sequence.adapter
    return (
        chunk.count == 1
        and chunk.samples
        and chunk.start >= sequence.virtual_tokens
        and not sequence.wants_prompt_logprobs
        and sequence.request.pool is None
        and (adapter is None or (adapter.model is None and not adapter.changes))
    )


class StaticBatch:
    """The input of decode steps, in buffers that stay; each has a twin on the CPU that it is filled from."""

    def __init__(self, rows: int, longest: int, padding_block: int, device: torch.device) -> None:
        """Up to `rows` rows of sequences up to `longest` tokens; rows beyond a step's own use block `padding_block`."""
        self._padding_block = padding_block

        def buffers(*shape: int, dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
            on_cpu = torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda")
            return on_cpu, torch.zeros(*shape, dtype=dtype, device=device)

        pairs = {
            "input_ids": buffers(rows),
            "position_ids": buffers(rows),
            "cache_rows": buffers(rows),
            "tiles": buffers(rows, 3),
            "lengths": buffers(rows, dtype=torch.int32),
            "tables": buffers(rows, -(-longest // BLOCK_TOKENS), dtype=torch.int32),
        }
        self._on_cpu = {name: on_cpu for name, (on_cpu, _) in pairs.items()}
        self._numpy = {name: on_cpu.numpy() for name, on_cpu in self._on_cpu.items()}
        self.on_device = {name: on_device for name, (_, on_device) in pairs.items()}
        """[rows, ...] each; see DecodingRows and kernels.triton Tiles"""

    def fill(self, rows: int, chunks: Sequence[ScheduledChunk], tiles: Sequence[tuple[int, int, int]]) -> None:
        """Puts the chunks into the first of `rows` rows. tiles: first row, rows, address of the slot's table.

        The copies are not waited for: whoever reads a step's result has waited for them too."""
        host = self._numpy
        for name in ("input_ids", "position_ids", "tiles", "lengths"):
            host[name][:rows] = 0
        host["lengths"][:rows] = 1
        for row, chunk in enumerate(chunks):
            table, position = chunk.sequence.block_table, chunk.start
            blocks = position // BLOCK_TOKENS + 1
            host["input_ids"][row] = chunk.sequence.tokens[position]
            host["position_ids"][row] = position
            host["cache_rows"][row] = table[blocks - 1] * BLOCK_TOKENS + position % BLOCK_TOKENS
            host["lengths"][row] = position + 1
            host["tables"][row, :blocks] = table[:blocks]
        host["cache_rows"][len(chunks) : rows] = self._padding_block * BLOCK_TOKENS
        host["tables"][len(chunks) : rows, 0] = self._padding_block
        for index, tile in enumerate(tiles):
            host["tiles"][index] = tile
        for name, on_device in self.on_device.items():
            on_device[:rows].copy_(self._on_cpu[name][:rows], non_blocking=True)


class DecodeSteps:
    """Forwards over a StaticBatch, captured or not."""

    def __init__(
        self,
        model: EngineModel,
        cache: BlockKVCache,
        triton: TritonKernels,
        device: torch.device,
        *,
        max_sequences: int,
        longest: int,
        capture: bool,
    ) -> None:
        """For up to `max_sequences` sequences of up to `longest` tokens; `capture` needs a CUDA device."""
        self._model = model
        self._cache = cache
        self._triton = triton
        self._device = device
        self._counts = row_counts(max_sequences)
        self._batch = StaticBatch(self._counts[-1], longest, cache.padding_block, device)
        self._all_rows = torch.arange(self._counts[-1], device=device)
        self._starts = torch.arange(self._counts[-1] + 1, dtype=torch.int32, device=device)
        self._compute = Captured(self._forward, device) if capture else self._forward

    def run(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor | None:
        """Logits [chunks, vocabulary], valid until the next call; None if these chunks must run in another way."""
        if len(chunks) > self._counts[-1] or not all(map(is_replayable, chunks)):
            return None
        rows = next(count for count in self._counts if count >= len(chunks))
        adapters = [chunk.sequence.adapter for chunk in chunks]
        tiles, most_ranks = self._triton.decode_tiles(
            [None if adapter is None else (adapter.block, adapter.slot) for adapter in adapters]
        )
        self._batch.fill(rows, chunks, tiles)
        logits = self._compute(rows, most_ranks)
        return None if logits is None else logits[: len(chunks)]

    def _forward(self, rows: int, most_ranks: int) -> torch.Tensor:
        """[rows, vocabulary] of what the buffers hold. most_ranks 0: no row has an adapter."""
        batch = {name: tensor[:rows] for name, tensor in self._batch.on_device.items()}
        all_rows = self._all_rows[:rows]
        decoding = DecodingRows(all_rows, batch["tables"], batch["lengths"], self._starts[: rows + 1], all_rows=True)
        products = self._triton.static_products(batch["tiles"], most_ranks) if most_ranks else None
        routing = Routing.of(products, self._device)
        plan = AttentionPlan(self._cache, batch["cache_rows"], [], [], blocks=decoding)
        return self._model.forward(batch["input_ids"], batch["position_ids"], all_rows, plan, routing, routing)


class Captured:
    """A forward for some number of rows and ranks, captured when these are first met, and replayed from then on."""

    def __init__(self, forward: Callable[[int, int], torch.Tensor], device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None  # what graph.pool() answers: where all graphs take their memory
        self._failed = False

    def __call__(self, rows: int, most_ranks: int) -> torch.Tensor | None:
        """What the forward returns, valid until the next call; None if it cannot be captured."""
        key = (rows, most_ranks)
        if key not in self._graphs and not self._failed:
            try:
                self._graphs[key] = self._capture(rows, most_ranks)
            except Exception as error:  # a forward that waits for the device, or no memory left for another graph
                self._failed = True
                log.warning("decode steps are not captured as CUDA graphs any more: %s", error)
        if key not in self._graphs:
            return None
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _capture(self, rows: int, most_ranks: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # Kernels are compiled and libraries take their workspaces in the first runs, which a capture must not see.
        current = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._forward(rows, most_ranks)
            current.wait_stream(stream)
            # thread_local: the load thread takes memory and copies meanwhile, on a stream of its own.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._forward(rows, most_ranks)
        finally:
            # A capture that fails leaves its own stream as the current one.
            torch.cuda.set_stream(current)
        self._pool = graph.pool()
        return graph, logits


def decode_steps_for(
    model: EngineModel, cache: AnyKVCache, device: torch.device, max_sequences: int, longest: int, wanted: bool
) -> DecodeSteps | None:
    """Captured decode steps where they are wanted and there are what they need: a CUDA device and kernels that read
    everything from it."""
    if not wanted or device.type != "cuda" or model.triton is None or not isinstance(cache, BlockKVCache):
        return None
    return DecodeSteps(model, cache, model.triton, device, max_sequences=max_sequences, longest=longest, capture=True)
