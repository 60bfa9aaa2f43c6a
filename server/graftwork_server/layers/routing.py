"""Which adapter each packed row belongs to, worked out once per forward and used by every layer.

Rows of one adapter that stand together form a span. Long spans are computed one by one (a GEMM with the adapter's own
A and B); spans of the same length over slots of one block are computed together (batched GEMM). Rows of the base are
not touched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from graftwork_server.kernels.native import NativeKernels
from graftwork_server.layers.changes import Changes
from graftwork_server.layers.slots import SlotBlock

if TYPE_CHECKING:
    from graftwork_server.kernels.triton.kernels import TritonKernels

_LONG_SPAN = 32
"""Rows from which a span is worth its own GEMMs."""
_PIECE = 64
"""Rows of a long span that one thread takes at a time in the kernels of whole layers."""


@dataclass(frozen=True)
class RowSpan:
    """Rows [start, end) of one adapter."""

    start: int
    end: int
    block: SlotBlock | None
    """Where its low-rank updates lie, if it has some."""
    slot: int
    changes: Changes
    """What else it changes (changes.py)."""

    def pieces(self, rows: int) -> Iterator[RowSpan]:
        """The same rows as spans of at most `rows`."""
        for start in range(self.start, self.end, rows):
            yield replace(self, start=start, end=min(start + rows, self.end))


@dataclass(frozen=True)
class _Batch:
    """Spans of equal length over slots of one block."""

    block: SlotBlock
    slots: slice | torch.Tensor
    count: int
    length: int
    rows: slice | torch.Tensor


class NativeSpans:
    """Spans over slots of one block, as the kernels take them (NativeKernels.lora)."""

    def __init__(self, spans: list[RowSpan]) -> None:
        block = spans[0].block
        assert block is not None  # spans without low-rank deltas never come here
        self.block = block
        table, rows = [], 0
        for span in spans:
            table.append([span.start, span.end - span.start, span.slot, rows])
            rows += span.end - span.start
        self.spans = torch.tensor(table)
        self.hidden = torch.empty(rows * block.most_ranks)


class SpanProducts(Protocol):
    """The low-rank products of all spans of a forward, where one launch serves them all (kernels/triton)."""

    def add(self, group: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the deltas of linear group `group` to y [rows, out of all members] in place; x [rows, in]."""


class Routing:
    """The spans of one forward, grouped for computation."""

    def __init__(
        self,
        spans: Sequence[RowSpan],
        device: torch.device,
        kernels: NativeKernels | None = None,
        triton: TritonKernels | None = None,
    ) -> None:
        self._spans = spans
        self._batches: list[_Batch] = []
        self._kernels = kernels
        self._native: list[NativeSpans] = []
        self._products: SpanProducts | None = None
        self.changed = [(slice(span.start, span.end), span.changes) for span in spans if span.changes]
        """Rows of adapters that change modules in other ways than by low-rank products, and how (changes.py)."""
        if triton is not None:
            self._products = triton.products(
                [(s.start, s.end, s.block, s.slot) for s in spans if s.block is not None],
                device,
            )
            return
        short: dict[tuple[int, int], list[RowSpan]] = defaultdict(list)
        for span in spans:
            if span.block is None:
                continue
            length = span.end - span.start
            if length >= _LONG_SPAN:
                self._batches.append(self._batch([span], device))
            else:
                short[id(span.block), length].append(span)
        if kernels is not None:
            self._native = _by_block(span for together in short.values() for span in together)
            return
        for together in short.values():
            self._batches.append(self._batch(sorted(together, key=lambda span: span.slot), device))

    @classmethod
    def of(cls, products: SpanProducts | None, device: torch.device) -> Routing:
        """The routing of a captured forward, whose spans are read from the device at each replay."""
        routing = cls((), device)
        routing._products = products
        return routing

    def __bool__(self) -> bool:
        return bool(self._batches or self._native or self._products or self.changed)

    def add_deltas(self, group: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the deltas of linear group `group`: x [rows, in], y [rows, out of all members], y in place."""
        if self._products is not None:
            self._products.add(group, x, y)
        for native in self._native:
            lora = native.block.groups[group]
            if lora is not None and self._kernels is not None:
                self._kernels.lora(x, y, native.spans, lora.a, lora.description, native.hidden)
        for batch in self._batches:
            lora = batch.block.groups[group]
            if lora is None:
                continue
            # [count, length, in] @ [count, in, sum of ranks]
            hidden = x[batch.rows].view(batch.count, batch.length, -1) @ lora.a[batch.slots].transpose(1, 2)
            for member in lora.members:
                # [count, length, rank] @ [count, rank, out]
                delta = torch.bmm(hidden[:, :, member.ranks], member.b[batch.slots]).view(-1, member.b.shape[2])
                if isinstance(batch.rows, slice):
                    y[batch.rows, member.columns] += delta
                else:
                    y[:, member.columns].index_add_(0, batch.rows, delta)

    def layer_spans(self) -> list[NativeSpans]:
        """The spans of low-rank deltas by block of slots, of whatever length, for kernels that compute whole layers."""
        return _by_block(piece for span in self._spans for piece in span.pieces(_PIECE))

    @staticmethod
    def _batch(spans: list[RowSpan], device: torch.device) -> _Batch:
        block = spans[0].block
        assert block is not None  # spans without low-rank deltas never come here
        length = spans[0].end - spans[0].start
        starts = [span.start for span in spans]
        slots = [span.slot for span in spans]
        contiguous_rows = starts == list(range(starts[0], starts[0] + len(spans) * length, length))
        rows: slice | torch.Tensor = slice(starts[0], starts[0] + len(spans) * length)
        if not contiguous_rows:
            rows = torch.tensor([row for start in starts for row in range(start, start + length)], device=device)
        contiguous_slots = slots == list(range(slots[0], slots[0] + len(slots)))
        slot_index: slice | torch.Tensor = slice(slots[0], slots[0] + len(slots))
        if not contiguous_slots:
            slot_index = torch.tensor(slots, device=device)
        return _Batch(block, slot_index, len(spans), length, rows)


def _by_block(spans: Iterable[RowSpan]) -> list[NativeSpans]:
    """The spans of low-rank deltas, those over slots of one block together."""
    by_block: dict[int, list[RowSpan]] = defaultdict(list)
    for span in spans:
        if span.block is not None:
            by_block[id(span.block)].append(span)
    return [NativeSpans(together) for together in by_block.values()]
