"""Whose place goes: which adapters may be evicted, which yield to loads that wait, and whose turn it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from graftwork_server.engine.adapters.record import AdapterRecord


@dataclass(frozen=True)
class Room:
    """What is on the device at one moment."""

    loaded: Sequence[AdapterRecord]
    """Least recently used first."""
    free_bytes: int
    wanted: Collection[str] = ()
    """Digests that sequences wait for."""

    def idle(self) -> list[AdapterRecord]:
        """What may be evicted, least recently used first; what sequences wait for comes last."""
        idle = [record for record in self.loaded if record.leases == 0 and not record.is_pinned]
        return sorted(idle, key=lambda record: record.digest in self.wanted)

    def to_go(self, loads: Sequence[AdapterRecord]) -> list[AdapterRecord]:
        """What `loads` need the places of, beside the room that is free or becomes so by itself: idle adapters first,
        then leased ones, least recently used first."""
        if not loads:
            return []
        unloading = [record for record in self.loaded if record.is_unloading]
        missing = needed_bytes(loads) - (self.free_bytes + bytes_of(unloading))
        leased = [record for record in self.loaded if record.leases and record.may_yield and record not in unloading]
        to_go: list[AdapterRecord] = []
        for record in [*self.idle(), *leased]:
            if missing <= 0:
                break
            to_go.append(record)
            missing -= bytes_of([record])
        return to_go

    def is_turn_of(self, load: AdapterRecord, before: Sequence[AdapterRecord]) -> bool:
        """Whether there is room now that no load `before` this one waits for."""
        to_go = self.to_go(before)
        now = self.free_bytes + bytes_of(self.idle())
        leaving = [record for record in self.loaded if record in to_go or record.is_unloading]
        later = bytes_of([record for record in leaving if record.leases])
        return load.needed_bytes <= now and load.needed_bytes + needed_bytes(before) <= now + later

    def pinned_bytes(self, beside: str) -> int:
        """What pinned adapters but `beside` take."""
        return bytes_of([r for r in self.loaded if r.is_pinned and not r.is_unloading and r.digest != beside])


def needed_bytes(loads: Collection[AdapterRecord]) -> int:
    """What loads need that wait for room."""
    # One that waits for its own earlier load to end needs no room beside that.
    return sum(record.needed_bytes for record in loads if record.loaded is None)


def bytes_of(records: Collection[AdapterRecord]) -> int:
    """What adapters take on the device."""
    return sum(record.loaded.bytes for record in records if record.loaded is not None)
