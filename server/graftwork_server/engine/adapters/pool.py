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
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from graftwork_server.engine.adapters.eviction import Room, bytes_of
from graftwork_server.engine.adapters.host_cache import HostCache
from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.engine.adapters.record import AdapterRecord
from graftwork_server.engine.adapters.slot_blocks import SlotBlocks
from graftwork_server.errors import ResourceExhausted
from graftwork_server.kernels.native import NativeKernels
from graftwork_server.layers.binding.prepared import PreparedAdapter
from graftwork_server.layers.slots import LinearShape
from graftwork_server.types import LoadReport

log = logging.getLogger("graftwork.engine")


class AdapterPool:
    """The engine's adapters by digest. Thread-safe: loads place and evict, the step loop leases and releases."""

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
        self.slots = SlotBlocks(groups, dtype, device, kernels)
        self._device = device
        self._records: dict[str, AdapterRecord] = {}
        self._waiting: list[AdapterRecord] = []
        """Loads that wait for room, in order of arrival."""
        self._has_yielding = False
        self._uses = 0
        self._changed = threading.Condition()

    # ------------------------------------------------------------------------------------------ records

    def record(self, digest: str) -> AdapterRecord:
        """What is known of an adapter."""
        with self._changed:
            return self._record(digest)

    def _record(self, digest: str) -> AdapterRecord:
        if digest not in self._records:
            self._records[digest] = AdapterRecord(digest)
        return self._records[digest]

    def known(self, digest: str) -> AdapterRecord | None:
        """What is known of an adapter, if anything is."""
        return self._records.get(digest)

    def forget(self, record: AdapterRecord) -> None:
        """Drops a record that says nothing any more."""
        with self._changed:
            self._forget(record)

    def _forget(self, record: AdapterRecord) -> None:
        if record.is_forgettable and record not in self._waiting:
            self._records.pop(record.digest, None)

    def loading(self) -> list[AdapterRecord]:
        """Those whose load is under way."""
        with self._changed:
            return [record for record in self._records.values() if record.is_loading]

    def _loaded(self) -> list[AdapterRecord]:
        """Those that are on the device, least recently used first."""
        loaded = [record for record in self._records.values() if record.loaded is not None]
        return sorted(loaded, key=lambda record: record.last_use)

    # ------------------------------------------------------------------------------------------ the step loop's side

    def digests(self) -> list[str]:
        """What is loaded now."""
        with self._changed:
            return [record.digest for record in self._loaded()]

    def lease(self, digest: str) -> LoadedAdapter | None:
        """The adapter with one more lease, or None if it is not loaded or is to go."""
        with self._changed:
            record = self._records.get(digest)
            if record is None or (adapter := record.leasable) is None:
                return None
            adapter.leases += 1
            self._use(record)
            return adapter

    def release(self, adapter: LoadedAdapter) -> None:
        """Gives one lease back."""
        with self._changed:
            adapter.leases -= 1
            adapter.is_new = False
            record = self._records.get(adapter.digest)
            is_last = record is not None and record.loaded is adapter and not adapter.leases
            if record is not None and is_last and record.is_unloading:
                self._drop(record)
            self._renew_yielding()

    def report(self, digest: str) -> LoadReport | None:
        """What the load of `digest` bound; None if it is not loaded or is to go."""
        with self._changed:
            record = self._records.get(digest)
            adapter = record.leasable if record is not None else None
            return adapter.report if adapter is not None else None

    def unload(self, digest: str) -> LoadedAdapter | None:
        """Unloads an adapter, at once or when its last lease ends; nobody gets a new lease from now on. The host's copy
        goes too. Returns what will be `gone` then, None if it is not loaded.
        """
        with self._changed:
            self.host_cache.discard(digest)
            record = self._records.get(digest)
            if record is None:
                return None
            record.is_evicted = False
            adapter = record.loaded
            if adapter is None:
                return None
            record.unload()
            if not adapter.leases:
                self._drop(record)
            self._renew_yielding()
            return adapter

    def pin(self, digests: Collection[str]) -> None:
        """These, and no others, are never evicted from now on."""
        with self._changed:
            wanted = frozenset(digests)
            for digest in wanted:
                self._record(digest)
            for record in list(self._records.values()):
                record.is_pinned = record.digest in wanted
                self._forget(record)
            self._renew_yielding()

    def is_pinned(self, digest: str) -> bool:
        """Loaded or not."""
        record = self._records.get(digest)
        return record is not None and record.is_pinned

    # ------------------------------------------------------------------------------------------ the loader's side

    def place_now(self, prepared: PreparedAdapter, started: float) -> LoadedAdapter | None:
        """As `place`, for a load ahead of time: None if room would have to be made for it at somebody's cost."""
        self._check_size(prepared)
        with self._changed:
            record = self._record(prepared.digest)
            if (adapter := self._leased_already(record)) is not None:
                return adapter
            idle = [other for other in self._room().idle() if other.digest not in self.wanted]
            available = self.budget_bytes - self.used_bytes + bytes_of(idle)
            if self._waiting or record.loaded is not None or available < prepared.device_bytes:
                return None
            victims = self._take_victims(idle, prepared.device_bytes)
        return self._fill(record, prepared, victims, started)

    def place(self, prepared: PreparedAdapter, started: float, given_up: threading.Event) -> LoadedAdapter | None:
        """Copies an adapter into the pool and returns it with one lease.

        Evicts adapters nobody leases, least recently used first; waits for leases to end while there are not enough,
        until it is `given_up`: then it returns None. `started` is time.perf_counter() at the request. Raises
        ResourceExhausted if it does not fit an empty pool (ADAPTER_TOO_LARGE), or not beside what is pinned
        (ADAPTERS_PINNED).
        """
        self._check_size(prepared)
        with self._changed:
            record = self._record(prepared.digest)
            record.wait(prepared.device_bytes)
            self._waiting.append(record)
            try:
                self._renew_yielding()
                while True:
                    if (adapter := self._leased_already(record)) is not None:
                        return adapter
                    self._check_pins(prepared)
                    room, before = self._room(), self._waiting[: self._waiting.index(record)]
                    if record.loaded is None and room.is_turn_of(record, before):
                        victims = self._take_victims(room.idle(), prepared.device_bytes)
                        break
                    if given_up.is_set():
                        return None
                    self._changed.wait(timeout=0.1)
            finally:
                self._waiting.remove(record)
                record.end_wait()
                self._renew_yielding()
        return self._fill(record, prepared, victims, started)

    def cache_on_host(self, prepared: PreparedAdapter) -> None:
        """Puts an adapter that found no room into the host cache, unless parts of it lie on a device of their own."""
        if self._device.type == "cpu" or prepared.lies_in_host_memory:
            self.host_cache.put(prepared)

    def ready_next_slot(self, like: LoadedAdapter) -> None:
        """Gives the next adapter of the same family memory to lie in, if there would be room."""
        if self.used_bytes + like.bytes <= self.budget_bytes:
            self.slots.touch_next(like)

    # ------------------------------------------------------------------------------------------ whose place goes

    def _room(self) -> Room:
        return Room(self._loaded(), self.budget_bytes - self.used_bytes, self.wanted)

    def _renew_yielding(self) -> None:
        """Called after every change of what is loaded, leased, pinned or waited for."""
        to_go = self._room().to_go(self._waiting) if self._waiting else []
        for record in self._records.values() if to_go or self._has_yielding else ():
            (record.yield_place if record in to_go else record.stay)()
        self._has_yielding = bool(to_go)
        self._changed.notify_all()

    def _check_pins(self, prepared: PreparedAdapter) -> None:
        pinned = self._room().pinned_bytes(beside=prepared.digest)
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

    def _leased_already(self, record: AdapterRecord) -> LoadedAdapter | None:
        adapter = record.leasable
        if adapter is not None:
            adapter.leases += 1
        return adapter

    def _take_victims(self, idle: Sequence[AdapterRecord], needed: int) -> list[LoadedAdapter]:
        """Takes as many as must go for `needed` bytes out of reach. Their bytes count until they are gone; the new
        adapter's count from now on."""
        victims: list[LoadedAdapter] = []
        while self.budget_bytes - self.used_bytes + sum(victim.bytes for victim in victims) < needed:
            victims.append(idle[len(victims)].evict())
        self.used_bytes += needed - sum(victim.bytes for victim in victims)
        return victims

    # ------------------------------------------------------------------------------------------ places

    def _fill(
        self, record: AdapterRecord, prepared: PreparedAdapter, victims: Sequence[LoadedAdapter], started: float
    ) -> LoadedAdapter:
        """Moves the victims to the host cache and the prepared adapter to the device. Copies without the lock: the step
        loop does not wait for them."""
        for adapter in victims:
            self._evict(adapter)
        try:
            block, slot = self.slots.fill(prepared)
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
            self._records[record.digest] = record
            record.settle(adapter)
            self._use(record)
            self.generation += 1
            self._renew_yielding()
        return adapter

    def _evict(self, adapter: LoadedAdapter) -> None:
        """Moves an adapter that nobody can lease any longer to the host cache, if there is memory for it."""
        packed, is_copied = None, adapter.bytes <= self.host_cache.budget_bytes
        if is_copied:
            try:
                packed = self.slots.read(adapter)
            except Exception as error:
                log.warning("adapter %s is not kept in host memory: %s", adapter.digest[:19], error)
                is_copied = False
        with self._changed:
            record = self._record(adapter.digest)
            if is_copied and record.is_evicted:  # not unloaded meanwhile
                self.cache_on_host(replace(adapter.prepared, packed=packed))
            record.is_evicted = False
            self._free(adapter)
            self._forget(record)

    def _drop(self, record: AdapterRecord) -> None:
        assert record.loaded is not None
        adapter = record.loaded
        record.gone()
        self.used_bytes -= adapter.bytes
        self._free(adapter)
        self._forget(record)

    def _free(self, adapter: LoadedAdapter) -> None:
        self.generation += 1
        self.slots.free(adapter.block, adapter.slot)
        adapter.forget()

    def _use(self, record: AdapterRecord) -> None:
        self._uses += 1
        record.last_use = self._uses
