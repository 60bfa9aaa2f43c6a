"""What the engine asks the plugins: to read adapters, to check them and jobs. Off the step loop, each call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from graftwork_plugins import BaseInfo, Delta, DeviceInfo
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.binding.prepared import PreparedAdapter
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.types import AdapterRef, ArtifactInfo, StrategyInfo
from graftwork_server.wire.engine import Inspect, InspectReply
from graftwork_server.wire.tuning import PreparedJob, PrepareJob


class Strategies(Protocol):
    """What the engine needs of the plugins; plugin_host.PluginHost is the one there is."""

    def infos(self) -> list[StrategyInfo]:
        """Every strategy, or why it failed to load."""

    def identify(self, path: Path) -> str:
        """The strategy that reads these files."""

    def load_deltas(self, path: Path, strategy_id: str, base: BaseInfo) -> list[Delta]:
        """What the files change in the base."""

    def prepare_job(
        self,
        strategy: str,
        config: dict[str, Any],
        row_count: int,
        total_tokens: int,
        base: BaseInfo,
        device: DeviceInfo,
        held_out_rows: int = 0,
    ) -> PreparedJob:
        """A job's settings checked and filled in, and what it will cost."""


class PluginCalls:
    """The plugins, asked about one base model."""

    def __init__(self, base: BaseModel, base_info: BaseInfo, strategies: Strategies, threads: int) -> None:
        self.strategies = strategies
        self._base = base
        self._base_info = base_info
        self._device = DeviceInfo(
            type="cuda" if base.device.type == "cuda" else "cpu",
            total_memory_bytes=_total_memory(base.device),
            threads=threads,
        )

    def read(self, adapter: AdapterRef) -> list[Delta]:
        """The deltas in an adapter's files."""
        return self.strategies.load_deltas(Path(adapter.path), adapter.strategy, self._base_info)

    def bind(self, digest: str, deltas: Sequence[Delta]) -> PreparedAdapter:
        """Deltas that fit the base, ready to be placed."""
        return bind(self._base, digest, deltas)

    def inspect(self, message: Inspect) -> InspectReply:
        """What is in an artifact, checked against the base."""
        path = Path(message.path)
        strategy = message.strategy or self.strategies.identify(path)
        deltas = self.strategies.load_deltas(path, strategy, self._base_info)
        prepared = bind(self._base, "", deltas, place=False)
        info = ArtifactInfo(
            strategy=strategy,
            parameter_count=prepared.parameter_count,
            rank=prepared.rank,
            modules_bound=prepared.modules_bound,
        )
        return InspectReply(info=info)

    def prepare_job(self, message: PrepareJob) -> PreparedJob:
        """A job's settings checked and filled in, and what it will cost."""
        return self.strategies.prepare_job(
            message.strategy,
            message.config,
            message.row_count,
            message.total_tokens,
            self._base_info,
            self._device,
            message.held_out_rows,
        )


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
