"""The resident base model, and whole checkpoints beside it that share its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftwork_server.base.describe import plain_name
from graftwork_server.base.tokenizer import resolved_tokenizer
from graftwork_server.base.weights import SharedWeights, assign_tensors, empty_model, pack
from graftwork_server.layers.attention.kv_cache import LayerShape
from graftwork_server.layers.fused_layers import AttentionSettings
from graftwork_server.layers.head import BoundHead
from graftwork_server.layers.models.model import EngineModel
from graftwork_server.text import ModelFacts
from graftwork_server.types import ModelInfo


@dataclass(frozen=True)
class BaseModel:
    """The resident base: ready to run, and what is to be known of it."""

    engine_model: EngineModel
    weights: SharedWeights
    info: ModelInfo
    layer_shapes: list[LayerShape]
    attention_settings: list[AttentionSettings]
    head: BoundHead | None = None
    """Of a base that is a classifier."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        return dtype


def tuned_model(base: BaseModel, tensors: dict[str, torch.Tensor]) -> tuple[EngineModel, int]:
    """A model of the base's class over `tensors` and what it takes on the device in bytes; tensors equal to the base's
    are the base's own. Names and shapes must be those of the base (checked by the caller); a tensor that the base ties
    to another comes under its name only where the two differ."""
    state = unwrapped_state(base)
    chosen: dict[str, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}
    for name, given in tensors.items():
        resident = state[name]
        tensor = given.to(base.device, resident.dtype)
        if torch.equal(tensor, resident):
            chosen[name] = resident
        else:
            own[name] = tensor
    packed_tensors = pack(own, base.device) if own else {}
    model = empty_model(base.engine_model.model.config)
    assign_tensors(model, chosen | packed_tensors)
    own_bytes = sum(tensor.nbytes for tensor in packed_tensors.values())
    tuned = EngineModel(model.eval().requires_grad_(False).to(base.device), base.engine_model.kernels)
    if base.engine_model.fused_layers:
        tuned.fuse_layers(base.attention_settings)
    return tuned, own_bytes


def resident_model(base: BaseModel) -> torch.nn.Module:
    """Another model over the base's own tensors, for a forward outside the step loop, on any thread: plain layers, and
    attention over one row."""
    model = empty_model(base.engine_model.model.config, base.info.quantization)
    state = unwrapped_state(base)
    assign_tensors(model, {entry.name: state[entry.name] for entry in base.weights.layout})
    return model.eval().requires_grad_(False).to(base.device)


def unwrapped_state(base: BaseModel) -> dict[str, torch.Tensor]:
    """The base's tensors by their names in the plain transformers model."""
    return {plain_name(name): tensor for name, tensor in base.engine_model.model.state_dict().items()}


def model_info(
    model: Any,
    source: str,
    dtype: torch.dtype,
    print_of_base: str,
    weights: SharedWeights,
    cache_dir: Path,
    **more: Any,
) -> ModelInfo:
    """What is to be known of a base. model: transformers', with its head if it has one; more: fields that differ from
    those of a causal model, `eos_token_ids` among them."""
    config = model.config.get_text_config()
    vocab_size, ends = int(config.vocab_size), list(more.get("eos_token_ids", ()))
    fields: dict[str, Any] = {"context_tokens": int(config.max_position_embeddings), "eos_token_ids": ends} | more
    return ModelInfo(
        fingerprint=print_of_base,
        source=source,
        architecture=type(model).__name__,
        model_type=config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        device=str(weights.device),
        vocab_size=vocab_size,
        weight_bytes=weights.size_bytes,
        tokenizer_dir=resolved_tokenizer(source, cache_dir, print_of_base, ModelFacts(ends, vocab_size)),
        kv_tokens=0,
        max_sequences=0,
        **fields,
    )
