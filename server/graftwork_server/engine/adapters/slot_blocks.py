"""Slots for low-rank adapters: blocks by family, made when they are needed and given back when they are empty."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.kernels.native import NativeKernels
from graftwork_server.layers.binding.prepared import PreparedAdapter
from graftwork_server.layers.slots import SLOTS_PER_BLOCK, LinearShape, Ranks, SlotBlock

_SPARE_BYTES = 32 * 1024 * 1024


class SlotBlocks:
    """The blocks of one device. Thread-safe."""

    def __init__(
        self, groups: Sequence[LinearShape], dtype: torch.dtype, device: torch.device, kernels: NativeKernels | None
    ) -> None:
        self._groups = groups
        self._dtype = dtype
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.kernels = kernels
        self.blocks: dict[Ranks, list[SlotBlock]] = {}
        self.spare: SlotBlock | None = None
        """The block that was emptied last, if it is small: who unloads an adapter often loads its successor."""
        self._lock = threading.Lock()

    def fill(self, prepared: PreparedAdapter) -> tuple[SlotBlock | None, int]:
        """Copies low-rank updates into a slot, if there are some. The step loop does not wait for it."""
        if not prepared.updates and prepared.packed is None:
            return None, 0
        with self._lock:
            block, slot = self._take(prepared.ranks)
        try:
            with self._beside_the_steps():
                block.write(slot, prepared.updates, prepared.packed, self.kernels)
        except BaseException:
            self.free(block, slot)
            raise
        return block, slot

    def read(self, adapter: LoadedAdapter) -> torch.Tensor | None:
        """A copy of an adapter's slot in host memory (PreparedAdapter.packed); None if it has none."""
        if adapter.block is None:
            return None
        with self._beside_the_steps():
            return adapter.block.read(adapter.slot)

    def free(self, block: SlotBlock | None, slot: int) -> None:
        """Gives a slot back."""
        if block is None:
            return
        with self._lock:
            block.free.append(slot)
            block.free.sort()
            blocks = self.blocks[block.ranks]
            empty = [block for block in blocks if len(block.free) == SLOTS_PER_BLOCK]
            if len(empty) == len(blocks):
                del self.blocks[block.ranks]
                self.spare = block if block.written_bytes <= _SPARE_BYTES else None
            elif empty and (len(empty) > 1 or empty[0].written_bytes > _SPARE_BYTES):
                blocks.remove(empty[-1])

    def touch_next(self, like: LoadedAdapter) -> None:
        """Gives the next adapter of the same family memory to lie in: a page that is written for the first time costs
        several times what the copy costs, and the operating system's whims. Of no use on a GPU."""
        with self._lock:
            block = like.block
            if block is None or self._device.type != "cpu":
                return
            block, slot = self._take(block.ranks)
        try:
            if slot in block.unused:
                block.clear(slot)
        finally:
            self.free(block, slot)

    def _take(self, ranks: Ranks) -> tuple[SlotBlock, int]:
        block = next((block for block in self.blocks.get(ranks, ()) if block.free), None)
        if block is None:
            spare, self.spare = self.spare, None
            if spare is None or spare.ranks != ranks:
                spare = SlotBlock(ranks, self._groups, self._dtype, self._device)
            block = spare
            self.blocks.setdefault(ranks, []).append(block)
        # One that was written before has its memory.
        slot = next((slot for slot in block.free if slot not in block.unused), block.free[0])
        block.free.remove(slot)
        return block, slot

    @contextmanager
    def _beside_the_steps(self) -> Iterator[None]:
        """On a GPU, copies run on a stream of their own, and are done at the end of the block."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
