"""Settings that are chosen for a job where its request leaves them open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graftwork_plugins.strategy import BaseInfo


@dataclass(frozen=True)
class Choice:
    """A setting's value, and why it was chosen: one sentence without a full stop, for the user."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Automatic:
    """Marks a field of a strategy's Config: `learning_rate: Annotated[float, Automatic(rule)] = Field(...)`.

    The host calls `rule` with the Config, everything else as the user set it, and the base, when it creates a job whose
    user did not set the field. A strategy that declares the field anew without the mark has its own default, as ever.
    """

    rule: Callable[[Any, BaseInfo], Choice]
