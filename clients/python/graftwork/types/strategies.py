"""Strategies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Strategy:
    """A strategy. config_schema is the JSON schema of its settings; load_error is "" unless it could not be loaded."""

    name: str
    strategy_id: str
    version: str
    api_version: int
    distribution: str
    description: str
    capabilities: tuple[str, ...]
    config_schema: Mapping[str, Any]
    load_error: str
