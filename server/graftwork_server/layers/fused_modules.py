"""RMSNorm and gated MLP of the base computed by one kernel each, where the kernel answers what the module answers.

transformers' modules are written for clarity: a norm is seven tensor operations, each a pass over memory and a call.
What a module computes is not told by its name alone, so each is tried on random input before it is replaced.
"""

from __future__ import annotations

from typing import Any

import torch

from graftwork_server.kernels.native import NativeKernels
from graftwork_server.layers.linear import AdaptedLinear


class FusedNorm(torch.nn.Module):
    """Stands where an RMSNorm of the base stood."""

    def __init__(self, base: torch.nn.Module, weight: torch.Tensor, eps: float, kernels: NativeKernels) -> None:
        super().__init__()
        self.base = base
        self.factors = weight
        """[size] float32: what the normed values are multiplied with"""
        self.eps = eps
        self._kernels = kernels

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> [..., size]"""
        return self._kernels.rms_norm(x, self.factors, self.eps)


class FusedGatedMLP:
    """The forward of an MLP that is down(silu(gate(x)) * up(x)), with gate and up computed by one GEMM."""

    def __init__(self, mlp: Any, kernels: NativeKernels) -> None:
        self._plain = mlp.forward
        self._gate, self._up, self._down, self._kernels = mlp.gate_proj, mlp.up_proj, mlp.down_proj, kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> [..., hidden]"""
        if self._gate._forward_hooks or self._up._forward_hooks:
            return self._plain(x)  # an adapter changes what one of them answers (changes.py)
        return self._down(self._kernels.silu_mul(self._gate.whole_group(x)))


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module of transformers' that stood here before it was wrapped."""
    if isinstance(module, AdaptedLinear | FusedNorm):
        return module.base
    return module


def fuse_modules(model: torch.nn.Module, kernels: NativeKernels) -> None:
    """Replaces what can be replaced in `model`, whose linears are wrapped."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), torch.Tensor):
            fused = _fused_norm(module, kernels)
            if fused is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, fused)
        elif _is_gated(module):
            forward = FusedGatedMLP(module, kernels)
            size = module.gate_proj.in_features
            if _same(module, forward, size, kernels.dtype):
                module.forward = forward


def _fused_norm(norm: Any, kernels: NativeKernels) -> FusedNorm | None:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float) or norm.weight.ndim != 1 or norm.weight.dtype != kernels.dtype:
        return None
    weight = norm.weight.detach().float()
    # Gemma's norms multiply by 1 + weight.
    for candidate in (weight, weight + 1):
        fused = FusedNorm(norm, candidate.contiguous(), eps, kernels)
        if _same(norm, fused, len(weight), kernels.dtype):
            return fused
    return None


def _is_gated(module: Any) -> bool:
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not (isinstance(gate, AdaptedLinear) and isinstance(up, AdaptedLinear) and isinstance(down, AdaptedLinear)):
        return False
    return gate.is_grouped_with(up)


@torch.inference_mode()
def _same(module: Any, fused: Any, size: int, dtype: torch.dtype) -> bool:
    """Whether both answer the same on random rows, but for rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, size, generator=generator).to(dtype)
    expected, answer = module(x).float(), fused(x).float()
    exact = dtype == torch.float32
    return torch.allclose(answer, expected, rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 2e-2)
