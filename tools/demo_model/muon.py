"""The optimizer of the demo base model's matrices."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Muon (orthogonalised momentum) for stacks of same-shaped matrices.

    ``torch.optim.Muon`` works in bfloat16 and one matrix at a time, which is slow on a processor without bfloat16;
    this one works in float32 and on all layers' matrices of one shape at once.
    """

    def __init__(
        self, matrices: Sequence[Tensor], lr: float, weight_decay: float, threads: int, momentum: float = 0.95
    ) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        # Stacks of four, so that the threads have work of one size to share.
        groups = [{"params": group[i : i + 4]} for group in shapes.values() for i in range(0, len(group), 4)]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pool = ThreadPoolExecutor(threads)

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is taken
        """Move every matrix along its orthogonalised Nesterov momentum."""
        list(self.pool.map(self.move, sorted(self.param_groups, key=lambda group: -group["params"][0].numel())))

    @torch.no_grad()
    def move(self, group: dict[str, Any]) -> None:
        """Move one stack of matrices."""
        torch.set_num_threads(1)
        gradients = torch.stack([matrix.grad for matrix in group["params"]])
        state = self.state[group["params"][0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        state["momentum"].lerp_(gradients, 1 - group["momentum"])
        update = orthogonalise(gradients.lerp_(state["momentum"], group["momentum"]))
        rows, columns = update.shape[-2:]
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        for matrix, change in zip(group["params"], update, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-scale)


def orthogonalise(stack: Tensor, rounds: int = 5) -> Tensor:
    """The nearest half-orthogonal matrices, by Newton-Schulz rounds with Muon's quintic coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
