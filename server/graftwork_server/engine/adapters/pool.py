"""The device pool: places for loaded adapters, sized in bytes, with leases, pins and least-recently-used eviction.

A load that finds no room waits its turn, in the order in which loads came. While loads wait, as many adapters yield as
they need, least recently used first: these give no new leases, so that their places are free once their running
sequences have ended; requests for them queue up behind as loads of their own. So adapters that are more than the pool
holds take turns, and none starves: the first load that waits has its room when those sequences have ended that ran
when it became the first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from graftwork_server.engine.adapters.host_cache import HostCache
from graftwork_server.engine.adapters.loaded import LoadedAdapter, PreparedAdapter
from graftwork_server.errors import ResourceExhausted
from graftwork_server.kernels.native import NativeKernels
from graftwork_server.layers.slots import SLOTS_PER_BLOCK, LinearShape, Ranks, SlotBlock
from graftwork_server.types import LoadReport

log = logging.getLogger("graftwork.engine")

_SPARE_BYTES = 32 * 1024 * 1024


@dataclass(eq=False)
class _Waiting:
    """A load that waits for room."""

    digest: str
    needed: int


class AdapterPool:
    """Loaded adapters by digest. Thread-safe: loads place and evict, the step loop leases and releases."""

    def __init__(
        self,
        budget_bytes: int,
        groups: Sequence[LinearShape],
        dtype: torch.dtype,
        device: torch.device,
        host_cache_bytes: int = 0,
        kernels: NativeKernels | None = None,
    ) -> None:
        """What is evicted goes to `host_cache`, of `host_cache_bytes`."""
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.host_cache = HostCache(host_cache_bytes)
        self.wanted: Collection[str] = ()
        """Digests that sequences wait for: a load ahead of time evicts none of them."""
        self.generation = 0
        """Counts loads and evictions; read without the lock."""
        self._groups = groups
        self._dtype = dtype
        self._device = device
        self._kernels = kernels
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # least recently used first
        self._blocks: dict[Ranks, list[SlotBlock]] = {}
        self._draining: set[str] = set()
        """Unloaded: dropped when their leases end."""
        self._yielding: set[str] = set()
        """To be evicted for loads that wait, when their leases end. Renewed whenever something changes."""
        self._evicting: set[str] = set()
        """On their way to the host cache."""
        self._pinned: frozenset[str] = frozenset()
        self._spare: SlotBlock | None = None
        """The block that was emptied last, if it is small: who unloads an adapter often loads its successor."""
        self._waiting: list[_Waiting] = []  # in order of arrival
        self._changed = threading.Condition()

    # ------------------------------------------------------------------------------------------ the step loop's side

    def digests(self) -> list[str]:
        """What is loaded now."""
        with self._changed:
            return list(self._loaded)

    def lease(self, digest: str) -> LoadedAdapter | None:
        """The adapter with one more lease, or None if it is not loaded or is to go."""
        with self._changed:
            adapter = self._loaded.get(digest)
            if adapter is None or self._is_leaving(digest):
                return None
            adapter.leases += 1
            self._loaded.move_to_end(digest)
            return adapter

    def release(self, adapter: LoadedAdapter) -> None:
        """Gives one lease back."""
        with self._changed:
            adapter.leases -= 1
            adapter.is_fresh = False
            if adapter.leases == 0 and adapter.digest in self._draining:
                self._drop(adapter)
            self._renew_yielding()

    def report(self, digest: str) -> LoadReport | None:
        """What the load of `digest` bound; None if it is not loaded or is to go."""
        with self._changed:
            adapter = self._loaded.get(digest)
            return adapter.report if adapter is not None and not self._is_leaving(digest) else None

    def unload(self, digest: str) -> LoadedAdapter | None:
        """Unloads an adapter, at once or when its last lease ends; nobody gets a new lease from now on. The host's copy
        goes too. Returns what will be `gone` then, None if it is not loaded.
        """
        with self._changed:
            self._evicting.discard(digest)
            self.host_cache.discard(digest)
            adapter = self._loaded.get(digest)
            if adapter is None:
                return None
            if adapter.leases:
                self._draining.add(digest)
            else:
                self._drop(adapter)
            self._renew_yielding()
            return adapter

    def pin(self, digests: Collection[str]) -> None:
        """These, and no others, are never evicted from now on."""
        with self._changed:
            self._pinned = frozenset(digests)
            self._renew_yielding()

    def is_pinned(self, digest: str) -> bool:
        """Loaded or not."""
        return digest in self._pinned

    # ------------------------------------------------------------------------------------------ the loader's side

    def place_now(self, prepared: PreparedAdapter, started: float) -> LoadedAdapter | None:
        """As `place`, for a load ahead of time: None if room would have to be made for it at somebody's cost."""
        self._check_size(prepared)
        with self._changed:
            if (adapter := self._leased_already(prepared.digest)) is not None:
                return adapter
            idle = [adapter for adapter in self._idle() if adapter.digest not in self.wanted]
            available = self.budget_bytes - self.used_bytes + _bytes(idle)
            if self._waiting or prepared.digest in self._loaded or available < prepared.device_bytes:
                return None
            victims = self._take_victims(idle, prepared.device_bytes)
        return self._fill(prepared, victims, started)

    def place(self, prepared: PreparedAdapter, started: float, given_up: threading.Event) -> LoadedAdapter | None:
        """Copies an adapter into the pool and returns it with one lease.

        Evicts adapters nobody leases, least recently used first; waits for leases to end while there are not enough,
        until it is `given_up`: then it returns None. `started` is time.perf_counter() at the request. Raises
        ResourceExhausted if it does not fit an empty pool (ADAPTER_TOO_LARGE), or not beside what is pinned
        (ADAPTERS_PINNED).
        """
        self._check_size(prepared)
        waiting = _Waiting(prepared.digest, prepared.device_bytes)
        with self._changed:
            self._waiting.append(waiting)
            try:
                self._renew_yielding()
                while True:
                    if (adapter := self._leased_already(prepared.digest)) is not None:
                        return adapter
                    self._check_pins(prepared)
                    if prepared.digest not in self._loaded and self._has_turn(waiting):
                        victims = self._take_victims(self._idle(), prepared.device_bytes)
                        break
                    if given_up.is_set():
                        return None
                    self._changed.wait(timeout=0.1)
            finally:
                self._waiting.remove(waiting)
                self._renew_yielding()
        return self._fill(prepared, victims, started)

    def _has_turn(self, waiting: _Waiting) -> bool:
        """Whether there is room now that no load before this one waits for."""
        before = self._waiting[: self._waiting.index(waiting)]
        leaving = {*self._draining, *(adapter.digest for adapter in self._to_go(before))}
        room = self.budget_bytes - self.used_bytes + _bytes(self._idle())
        later = _bytes([a for a in self._loaded.values() if a.leases and a.digest in leaving])
        return waiting.needed <= room and waiting.needed + self._needed(before) <= room + later

    def _renew_yielding(self) -> None:
        """Called after every change of what is loaded, leased, pinned or waited for."""
        self._yielding = {adapter.digest for adapter in self._to_go(self._waiting)}
        self._changed.notify_all()

    def _to_go(self, loads: Collection[_Waiting]) -> list[LoadedAdapter]:
        """What `loads` need the places of, beside the room that is free or becomes so by itself: idle adapters first,
        then leased ones, least recently used first."""
        if not loads:
            return []
        available = self.budget_bytes - self.used_bytes + _bytes([self._loaded[digest] for digest in self._draining])
        missing = self._needed(loads) - available
        leased = [a for a in self._loaded.values() if a.leases and not a.is_fresh and a.digest not in self._pinned]
        to_go: list[LoadedAdapter] = []
        for adapter in [*self._idle(), *(a for a in leased if a.digest not in self._draining)]:
            if missing <= 0:
                break
            to_go.append(adapter)
            missing -= adapter.bytes
        return to_go

    def _needed(self, loads: Collection[_Waiting]) -> int:
        # One that waits for its own earlier load to end needs no room beside that.
        return sum(load.needed for load in loads if load.digest not in self._loaded)

    def _check_pins(self, prepared: PreparedAdapter) -> None:
        others = self._pinned - self._draining - {prepared.digest}
        pinned = _bytes([adapter for digest, adapter in self._loaded.items() if digest in others])
        if pinned + prepared.device_bytes > self.budget_bytes:
            raise ResourceExhausted(
                f"pinned adapters take {pinned} of the pool's {self.budget_bytes} bytes, and the adapter's "
                f"{prepared.device_bytes} do not fit beside them; unpin one, or start the server with a larger "
                "--adapter-memory-bytes",
                reason="ADAPTERS_PINNED",
            )

    def _check_size(self, prepared: PreparedAdapter) -> None:
        if prepared.device_bytes > self.budget_bytes:
            raise ResourceExhausted(
                f"the adapter takes {prepared.device_bytes} bytes on the device, the pool has {self.budget_bytes}; "
                "start the server with a larger --adapter-memory-bytes",
                reason="ADAPTER_TOO_LARGE",
            )

    def _leased_already(self, digest: str) -> LoadedAdapter | None:
        adapter = self._loaded.get(digest)
        if adapter is None or self._is_leaving(digest):
            return None
        adapter.leases += 1
        return adapter

    def _is_leaving(self, digest: str) -> bool:
        return digest in self._draining or digest in self._yielding

    def _idle(self) -> list[LoadedAdapter]:
        """What may be evicted, least recently used first; what sequences wait for comes last."""
        idle = [a for a in self._loaded.values() if a.leases == 0 and a.digest not in self._pinned]
        return sorted(idle, key=lambda adapter: adapter.digest in self.wanted)

    def _take_victims(self, idle: list[LoadedAdapter], needed: int) -> list[LoadedAdapter]:
        """Takes as many as must go for `needed` bytes out of reach. Their bytes count until they are gone; the new
        adapter's count from now on."""
        victims: list[LoadedAdapter] = []
        while self.budget_bytes - self.used_bytes + _bytes(victims) < needed:
            victims.append(idle[len(victims)])
        for adapter in victims:
            del self._loaded[adapter.digest]
            self._evicting.add(adapter.digest)
        self.used_bytes += needed - _bytes(victims)
        return victims

    def _fill(self, prepared: PreparedAdapter, victims: list[LoadedAdapter], started: float) -> LoadedAdapter:
        """Moves the victims to the host cache and the prepared adapter to the device. Copies without the lock: the step
        loop does not wait for them."""
        for adapter in victims:
            self._evict(adapter)
        with self._changed:
            for adapter in victims:
                self._free_slot(adapter)
        try:
            in_slot = bool(prepared.updates) or prepared.packed is not None
            block, slot = self._written_slot(prepared) if in_slot else (None, 0)
        except BaseException:
            with self._changed:
                self.used_bytes -= prepared.device_bytes
                self._renew_yielding()
            raise
        report = LoadReport(
            modules_bound=prepared.modules_bound,
            rank=prepared.rank,
            device_bytes=prepared.device_bytes,
            load_ms=(time.perf_counter() - started) * 1000,
        )
        adapter = LoadedAdapter(replace(prepared, updates=(), packed=None), report, block, slot, leases=1)
        with self._changed:
            self._loaded[prepared.digest] = adapter
            self.generation += 1
            self._renew_yielding()
        return adapter

    def _written_slot(self, prepared: PreparedAdapter) -> tuple[SlotBlock, int]:
        with self._changed:
            block, slot = self._take_slot(prepared.ranks)
        try:
            with self._beside_the_steps():
                block.write(slot, prepared.updates, prepared.packed, self._kernels)
        except BaseException:
            with self._changed:
                self._give_slot_back(block, slot)
            raise
        return block, slot

    def keep(self, prepared: PreparedAdapter) -> None:
        """Puts an adapter that found no room into the host cache, unless parts of it lie on a device of their own."""
        if self._device.type == "cpu" or prepared.lies_in_host_memory:
            self.host_cache.put(prepared)

    def _evict(self, adapter: LoadedAdapter) -> None:
        """Moves an adapter that nobody can lease any longer to the host cache, if there is memory for it."""
        packed, is_copied = None, adapter.bytes <= self.host_cache.budget_bytes
        if is_copied and adapter.block is not None:
            try:
                with self._beside_the_steps():
                    packed = adapter.block.read(adapter.slot)
            except Exception as error:
                log.warning("adapter %s is not kept in host memory: %s", adapter.digest[:19], error)
                is_copied = False
        with self._changed:
            if is_copied and adapter.digest in self._evicting:  # not unloaded meanwhile
                self.keep(replace(adapter.prepared, packed=packed))
            self._evicting.discard(adapter.digest)

    @contextmanager
    def _beside_the_steps(self) -> Iterator[None]:
        """On a GPU, copies run on a stream of their own, and are done at the end of the block."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def ready_next_slot(self, like: LoadedAdapter) -> None:
        """Gives the next adapter of the same family memory to lie in: a page that is written for the first time costs
        several times what the copy costs, and the operating system's whims. Of no use on a GPU."""
        with self._changed:
            block = like.block
            if block is None or self._device.type != "cpu" or self.used_bytes + like.bytes > self.budget_bytes:
                return
            block, slot = self._take_slot(block.ranks)
        try:
            if slot in block.unused:
                block.clear(slot)
        finally:
            with self._changed:
                self._give_slot_back(block, slot)

    # ------------------------------------------------------------------------------------------ places

    def _drop(self, adapter: LoadedAdapter) -> None:
        del self._loaded[adapter.digest]
        self._draining.discard(adapter.digest)
        self.used_bytes -= adapter.bytes
        self._free_slot(adapter)

    def _free_slot(self, adapter: LoadedAdapter) -> None:
        self.generation += 1
        if adapter.block is not None:
            self._give_slot_back(adapter.block, adapter.slot)
        adapter.forget()

    def _take_slot(self, ranks: Ranks) -> tuple[SlotBlock, int]:
        block = next((block for block in self._blocks.get(ranks, ()) if block.free), None)
        if block is None:
            spare, self._spare = self._spare, None
            if spare is None or spare.ranks != ranks:
                spare = SlotBlock(ranks, self._groups, self._dtype, self._device)
            block = spare
            self._blocks.setdefault(ranks, []).append(block)
        # One that was written before has its memory.
        slot = next((slot for slot in block.free if slot not in block.unused), block.free[0])
        block.free.remove(slot)
        return block, slot

    def _give_slot_back(self, block: SlotBlock, slot: int) -> None:
        block.free.append(slot)
        block.free.sort()
        blocks = self._blocks[block.ranks]
        empty = [block for block in blocks if len(block.free) == SLOTS_PER_BLOCK]
        if len(empty) == len(blocks):
            del self._blocks[block.ranks]
            self._spare = block if block.written_bytes <= _SPARE_BYTES else None
        elif empty and (len(empty) > 1 or empty[0].written_bytes > _SPARE_BYTES):
            blocks.remove(empty[-1])


def _bytes(adapters: Collection[LoadedAdapter]) -> int:
    return sum(adapter.bytes for adapter in adapters)
