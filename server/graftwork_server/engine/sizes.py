"""How large caches and pools are where the settings leave it to the engine: by the device's memory."""

from __future__ import annotations

import torch

from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.layers.models.base_model import BaseModel


def kv_blocks(base: BaseModel, max_sequences: int, memory_bytes: int) -> int:
    """Blocks of the KV cache: for `max_sequences` whole contexts, if that fits `memory_bytes` (0: a share of what is
    free on CUDA, 2 GiB on a CPU). 0 for a base that needs none."""
    if not base.info.generates:
        return 0
    per_block = BLOCK_TOKENS * sum(shape.bytes_per_token(base.dtype) for shape in base.layer_shapes)
    wanted = max_sequences * -(-base.info.context_tokens // BLOCK_TOKENS)
    return max(1, min(wanted, (memory_bytes or _share(base.device, 0.6)) // per_block))


def adapter_pool_bytes(device: torch.device) -> int:
    """What loaded adapters may take."""
    return _share(device, 0.2)


def host_cache_bytes(device: torch.device) -> int:
    """What evicted adapters may take in host memory."""
    return 4 * 1024**3 if device.type == "cuda" else 0


def _share(device: torch.device, of_free: float) -> int:
    return int(torch.cuda.mem_get_info(device)[0] * of_free) if device.type == "cuda" else 2 * 1024**3
