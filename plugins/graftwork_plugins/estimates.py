"""Upper bounds for a strategy's `estimate`, from the sizes of the base's linear layers."""

from __future__ import annotations

from graftwork_plugins.strategy import BaseInfo


def activation_bytes(base: BaseInfo, tokens: int, *, compute_bytes: int | None = None) -> int:
    """Most memory that one forward and backward of `tokens` tokens holds at once, weights and gradients not counted.

    `compute_bytes`: size of one value in the forward (4 for float32, 2 for bfloat16); None: that of the base's dtype.
    Counted are each linear layer's input and output, what lies between them (norms, gates, rotated heads, attention),
    and the logits with their float32 copy, softmax and gradient. No gradient checkpointing is assumed, and attention
    that does not keep its scores.
    """
    between = 3
    if compute_bytes is None:
        compute_bytes = 4 if base.dtype == "float32" else 2
    widths = [
        in_features + out_features
        for name, (in_features, out_features) in base.linear_modules.items()
        if name != base.output_module
    ]
    logits = tokens * _vocabulary_size(base) * (2 * compute_bytes + 3 * 4)
    return between * tokens * sum(widths) * compute_bytes + logits


def _vocabulary_size(base: BaseInfo) -> int:
    """Size of the logits."""
    if base.output_module is not None and base.output_module in base.linear_modules:
        return base.linear_modules[base.output_module][1]
    return int(base.config.get("vocab_size", 0))
