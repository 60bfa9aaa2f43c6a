"""How far two right answers in floating point may lie apart, so that no test holds on one kind of processor only.

Sums of the same products in another order differ by rounding: vectors of another width, another batch's GEMM, another
number of threads. Each of n additions rounds by at most half of eps of what has been summed so far. The errors point
either way, so that they grow as sqrt(n); partial sums may be a few times the result. What a fault changes (a wrong row,
a scale or a mask that is missing) is thousands of times more.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_PARTIAL_SUMS = 4
"""Times the largest result that a partial sum may be, with what is left of the constant above."""

FORWARD_TERMS = 3 * (48 + 8 + 64 + 48 + 48 + 80) + 48
"""Products that are summed one after another on the way through a model of tests/toys: in each layer query and key,
their scores, the values, the attention's output, gate and up, down; then the logits."""


def rounding(values: Any, terms: int) -> float:
    """The largest difference that sums of `terms` products may have from `values`: a tensor, or a number that was
    computed in float32."""
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.float32)
    finite = tensor[tensor.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return _PARTIAL_SUMS * torch.finfo(tensor.dtype).eps * math.sqrt(terms) * largest


def assert_near(actual: torch.Tensor, expected: torch.Tensor, terms: int = FORWARD_TERMS, what: str = "") -> None:
    """They differ by no more than rounding explains."""
    bound = rounding(expected, terms)
    torch.testing.assert_close(
        actual, expected, atol=bound, rtol=0, msg=lambda text: f"{what or 'values'}, {bound:.1e} allowed: {text}"
    )
