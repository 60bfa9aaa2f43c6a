"""The usual learning rate of full tuning, from which the strategies on board derive theirs."""

from __future__ import annotations

from graftwork_plugins import BaseInfo

FULL_RATE, FULL_WIDTH = 2e-5, 4096
"""The usual rate of full tuning (Llama 2 and Alpaca, 7B parameters), and the width of those models."""


def model_width(base: BaseInfo) -> int:
    """Size of the hidden states, as far as the base says it: of its input embedding, or its configuration's."""
    _, width = base.embedding_modules.get(base.input_module or "", (0, 0))
    return width or int(base.config.get("hidden_size") or FULL_WIDTH)


def full_rate(base: BaseInfo) -> float:
    """Peak learning rate of full tuning with AdamW: in inverse proportion to the model's width (arXiv:2203.03466)."""
    return FULL_RATE * FULL_WIDTH / model_width(base)
