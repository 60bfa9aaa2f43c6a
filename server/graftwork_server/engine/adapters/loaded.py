"""An adapter on its way to the device, and on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graftwork_server.layers.binding.prepared import PreparedAdapter
from graftwork_server.layers.slots import SlotBlock
from graftwork_server.types import LoadReport


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter on the device."""

    prepared: PreparedAdapter
    """As it came, without what lies in the slot now."""
    report: LoadReport
    block: SlotBlock | None
    slot: int
    leases: int = 0
    is_new: bool = True
    """No lease has ended yet, so sequences that waited for it may not have had their chance: it need not yield."""
    gone: bool = False
    """Its place was given to others."""

    def __post_init__(self) -> None:
        self.digest = self.prepared.digest
        self.bytes = self.prepared.device_bytes
        self.model = self.prepared.model
        self.changes = self.prepared.changes
        self.prefix = self.prepared.prefix
        self.head = self.prepared.head

    def forget(self) -> None:
        """Lets go of what it holds on the device, whoever may still have this object."""
        self.gone = True
        self.prepared = replace(self.prepared, model=None, changes={}, prefix=None, head=None)
        self.block = None
        self.model, self.changes, self.prefix, self.head = None, {}, None, None
