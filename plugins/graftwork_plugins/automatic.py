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


FULL_RATE, FULL_WIDTH = 2e-5, 4096
"""The usual rate of full tuning (Llama 2 and Alpaca, 7B parameters), and the width of those models."""


def model_width(base: BaseInfo) -> int:
    """Size of the hidden states, as far as the base says it: of its input embedding, or its configuration's."""
    _, width = base.embedding_modules.get(base.input_module or "", (0, 0))
    return width or int(base.config.get("hidden_size") or FULL_WIDTH)


def full_rate(base: BaseInfo) -> float:
    """Peak learning rate of full tuning with AdamW: in inverse proportion to the model's width (arXiv:2203.03466)."""
    return FULL_RATE * FULL_WIDTH / model_width(base)
