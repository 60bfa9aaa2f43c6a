"""Virtual tokens: keys and values that stand in the cache before a sequence's own tokens.

Prefix tuning brings them. Prompt tuning brings embeddings, whose keys and values nothing that follows can change: they
are computed once, when the adapter is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from graftwork_plugins import Prefix
from graftwork_server.kernels.attention.rotary import sequence_lengths
from graftwork_server.layers.binding.checks import check_values, rejected
from graftwork_server.layers.models.base_model import BaseModel, resident_model
from graftwork_server.layers.prefix import PrefixKV


def bind_prefix(base: BaseModel, delta: Prefix) -> PrefixKV:
    """The prefix in the base's shapes and dtype. Raises FailedPrecondition naming what does not fit."""
    if delta.embeddings is None:
        return _of_keys_and_values(base, delta)
    if delta.keys or delta.values:
        raise rejected("prefix", "a prefix has either embeddings or keys and values; this one has both")
    hidden_size = base.engine_model.model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    shape = list(delta.embeddings.shape)
    if len(shape) != 2 or shape[0] == 0 or shape[1] != hidden_size:
        raise rejected("prefix", f"the virtual tokens are {shape}; this base takes [virtual tokens, {hidden_size}]")
    check_values("prefix", delta.embeddings)
    _check_length(base, shape[0])
    model = resident_model(base)
    lengths = [shape[0], *(border + 1 for border in base.engine_model.rope_borders)]
    caches: list[Any] = [DynamicCache() for _ in lengths]
    for length, cache in zip(lengths, caches, strict=True):
        rows = torch.full((shape[0],), length, device=base.device)
        with torch.inference_mode(), sequence_lengths(rows):
            model(
                inputs_embeds=delta.embeddings[None].to(base.device, base.dtype),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    return PrefixKV(
        shape[0],
        [[layer.keys[0].contiguous() for layer in cache.layers] for cache in caches],
        [[layer.values[0].contiguous() for layer in cache.layers] for cache in caches],
    )


def _of_keys_and_values(base: BaseModel, delta: Prefix) -> PrefixKV:
    layers = len(base.layer_shapes)
    if len(delta.keys) != layers or len(delta.values) != layers:
        raise rejected(
            "prefix", f"the prefix has keys of {len(delta.keys)} and values of {len(delta.values)} layers, not {layers}"
        )
    tokens = delta.keys[0].shape[1] if delta.keys[0].dim() == 3 else 0
    for index, shape in enumerate(base.layer_shapes):
        for what, tensor, dim in (
            ("keys", delta.keys[index], shape.key_dim),
            ("values", delta.values[index], shape.value_dim),
        ):
            wanted = [shape.kv_heads, tokens, dim]
            if list(tensor.shape) != wanted or not tokens:
                raise rejected(
                    "prefix",
                    f"the {what} of layer {index} are {list(tensor.shape)}; this base takes "
                    f"[{shape.kv_heads}, virtual tokens, {dim}]",
                )
            check_values(f"the {what} of layer {index}", tensor, "prefix")
    _check_length(base, tokens)
    keys, values = (
        [tensor.to(base.device, base.dtype).contiguous() for tensor in tensors]
        for tensors in (delta.keys, delta.values)
    )
    return PrefixKV(tokens, [keys], [values])


def _check_length(base: BaseModel, tokens: int) -> None:
    if tokens >= base.info.context_tokens:
        raise rejected("prefix", f"{tokens} virtual tokens leave no room in {base.info.context_tokens} of context")
