"""Which device and dtype the base model runs in."""

from __future__ import annotations

import torch

from graftwork_server.errors import FailedPrecondition


def choose_device(name: str) -> torch.device:
    """auto: cuda if there is one. Raises FailedPrecondition if cuda is asked for and missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise FailedPrecondition("--device cuda: torch sees no CUDA device; use cpu or auto", reason="DEVICE_MISSING")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
