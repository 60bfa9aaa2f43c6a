"""An adapter whose deltas were bound to the base, ready to be placed on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graftwork_server.layers.changes import Changes
from graftwork_server.layers.head import BoundHead
from graftwork_server.layers.models.model import EngineModel
from graftwork_server.layers.prefix import PrefixKV
from graftwork_server.layers.slots import Ranks, Updates


@dataclass(frozen=True, kw_only=True)
class PreparedAdapter:
    """An adapter read, checked against the base and converted, ready to be placed. Made off the step loop."""

    digest: str
    modules_bound: int
    rank: int
    parameter_count: int
    device_bytes: int
    ranks: Ranks = ()
    updates: Updates = ()
    """Its low-rank updates of linear layers, shapes checked. They are written into a slot, and their values checked, as
    they come from the file's mapping: each byte is read once and written once."""
    packed: torch.Tensor | None = None
    """Instead of `updates`, where it was in a slot before: [elements] in host memory, page-locked where it goes to a
    GPU; A [sum of ranks, in] of each linear group with ranks, then B [rank, out] of their members, scaled."""
    model: EngineModel | None = None
    """A whole tuned checkpoint, bound to a model of its own."""
    changes: Changes = field(default_factory=dict)
    """What it changes beside low-rank products, on the device already."""
    prefix: PrefixKV | None = None
    """Virtual tokens before each sequence, on the device already."""
    head: BoundHead | None = None
    """What classifies instead of generating, on the device already."""

    @property
    def lies_in_host_memory(self) -> bool:
        """Nothing of it is on the device yet."""
        return self.model is None and not self.changes and self.prefix is None and self.head is None
