"""Virtual tokens: keys and values that stand in the cache before a sequence's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graftwork_server.layers.attention.block_kv_cache import AnyKVCache


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values of an adapter's virtual tokens, on the device."""

    tokens: int
    keys: list[list[torch.Tensor]]
    """For each layer [kv_heads, tokens, key_dim]; several times if they depend on the sequence's rope_regime."""
    values: list[list[torch.Tensor]]
    """For each layer [kv_heads, tokens, value_dim], as often."""

    @property
    def device_bytes(self) -> int:
        """What they take."""
        return sum(tensor.nbytes for of_layers in (*self.keys, *self.values) for tensor in of_layers)

    def write(self, cache: AnyKVCache, start: int, rows: torch.Tensor, rope_regime: int = 0) -> None:
        """Writes virtual tokens [start, start + len(rows)) of a sequence of that regime to cache rows `rows`."""
        part = slice(start, start + len(rows))
        index = min(rope_regime, len(self.keys) - 1)
        for layer, (key, value) in enumerate(zip(self.keys[index], self.values[index], strict=True)):
            cache.write(layer, rows, key[:, part], value[:, part])
