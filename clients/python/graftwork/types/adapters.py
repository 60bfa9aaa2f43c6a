"""Adapters and their versions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class LoadReport:
    """What a load bound: base modules that got a delta, highest rank (0: none), bytes on the device, milliseconds."""

    modules_bound: int
    rank: int
    device_bytes: int
    load_ms: float
    already_loaded: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter and its newest version, or the version that was asked for.

    tuning_job is "" for an uploaded one. load_report is set by create(load=True), load() and pin() only; unpinned by
    unload(): true if that ended a pin. follows_version: the version that the name served before; 0: none.
    """

    name: str
    adapter_id: str
    version: int
    digest: str
    strategy: str
    base_fingerprint: str
    size_bytes: int
    parameter_count: int
    loaded: bool
    create_time: datetime | None
    tuning_job: str
    rank: int
    pinned: bool = False
    load_report: LoadReport | None = None
    unpinned: bool = False
    follows_version: int = 0
