"""Loading a causal model and making it ready for packed forwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from graftwork_server.base.describe import fingerprint
from graftwork_server.base.pretrained import causal_model
from graftwork_server.base.quantization import check_available, quantize_linears
from graftwork_server.base.weights import SharedWeights
from graftwork_server.kernels.attention.rotary import rotate_by_length
from graftwork_server.kernels.native import native_kernels
from graftwork_server.kernels.triton import triton_kernels
from graftwork_server.layers.attention.kv_cache import KVCache, LayerShape
from graftwork_server.layers.attention.paged import Chunk, plan_attention
from graftwork_server.layers.changes import changeable_modules
from graftwork_server.layers.fused_layers import AttentionSettings
from graftwork_server.layers.models.base_model import BaseModel, model_info
from graftwork_server.layers.models.model import EngineModel
from graftwork_server.layers.models.probe import (
    PROBE_ROWS,
    check_packing,
    logprobs_alone,
    logprobs_packed,
    probe_layers,
)

log = logging.getLogger("graftwork.engine")
_ROUNDED_MEAN = 0.25
"""What log probabilities of dtypes coarser than float32 may differ by: rounding alone moves single ones by 0.1."""


def load_base(
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    cache_dir: Path,
    native: bool = True,
    quantization: str = "none",
) -> BaseModel:
    """Loads a directory; `native` takes the engine's own kernels where they can be had; `quantization`
    is none, nf4 or int8 (base/quantization.py).

    Raises FailedPrecondition, saying what is wrong, if it cannot be served.
    """
    check_available(quantization, device)
    model = causal_model(source, dtype)
    # Of the checkpoint, not of how it is served: an adapter fits the base quantised or not.
    print_of_base = fingerprint(model.config.to_dict(), model.state_dict())
    parameter_count = sum(parameter.numel() for parameter in model.parameters())
    if quantization != "none":
        log.info("starting: quantising the linear layers to %s", quantization)
    quantize_linears(model, quantization, device)
    model.to(device)
    log.info("starting: probing %s, rows one by one and packed together", type(model).__name__)
    shapes, settings = probe_layers(model)
    expected = logprobs_alone(model)
    if rotate_by_length(model):
        log.warning("dynamic NTK scaling begins beyond max_position_embeddings, where the context of this base ends")
    weights = SharedWeights(model, device, quantization)
    engine_model = EngineModel(model, native_kernels(device, dtype) if native else None)
    if native:
        engine_model.triton = triton_kernels(device, dtype, [group.out_features for group in engine_model.groups])
    # int8 rounds what goes into each layer: the smallest difference may become one of a 127th.
    _check_probe(engine_model, expected, exact=dtype == torch.float32 and quantization != "int8")
    _fuse_layers(engine_model, shapes, settings, device)
    info = model_info(
        model,
        source,
        dtype,
        print_of_base,
        weights,
        cache_dir,
        parameter_count=parameter_count,
        eos_token_ids=_eos_token_ids(model),
        quantization=quantization,
    )
    return BaseModel(engine_model, weights, info, shapes, settings)


def _check_probe(engine_model: EngineModel, expected: torch.Tensor, exact: bool) -> None:
    """Runs the probe's rows packed into one forward, and refuses a model whose answers change by that."""
    model: Any = engine_model.model
    found, row_dims = logprobs_packed(model)
    engine_model.changeable = changeable_modules(model, row_dims, model.get_output_embeddings())
    for group in engine_model.groups:
        group.forget()
    differences = [(found - expected).abs()]
    check_packing(type(model).__name__, "log probabilities", differences, exact=exact, rounded_mean=_ROUNDED_MEAN)


def _fuse_layers(
    engine_model: EngineModel, shapes: list[LayerShape], settings: list[AttentionSettings], device: torch.device
) -> None:
    """Has kernels compute whole layers, unless that changes a trial's answers, for prompts and for decoded tokens."""
    if engine_model.kernels is None:
        return
    expected = _trial_logprobs(engine_model, shapes, device)
    engine_model.fuse_layers(settings)
    difference = (_trial_logprobs(engine_model, shapes, device) - expected).abs().mean().item()
    if engine_model.fused_layers and not difference <= _ROUNDED_MEAN / 4:
        log.warning("whole layers are not computed by kernels: log probabilities would differ by %.2g", difference)
        engine_model.unfuse_layers()


def _trial_logprobs(engine_model: EngineModel, shapes: list[LayerShape], device: torch.device) -> torch.Tensor:
    """Log probabilities [tokens, vocabulary] of the probe rows on a small KV cache, their last tokens decoded."""
    model: Any = engine_model.model
    vocab = model.config.get_text_config().vocab_size
    cache = KVCache(shapes, len(PROBE_ROWS), model.dtype, device, engine_model.kernels)
    prompts = [Chunk([index], 0, len(row) - 1) for index, row in enumerate(PROBE_ROWS)]
    last = [Chunk([index], len(row) - 1, 1) for index, row in enumerate(PROBE_ROWS)]
    logits = []
    with torch.inference_mode():
        for chunks in (prompts, last):
            ids = [PROBE_ROWS[c.block_table[0]][p] % vocab for c in chunks for p in range(c.start, c.start + c.count)]
            positions = [position for c in chunks for position in range(c.start, c.start + c.count)]
            plan = plan_attention(cache, chunks, device)
            keep = torch.arange(len(ids), device=device)
            tensors = (torch.tensor(ids, device=device), torch.tensor(positions, device=device))
            logits.append(engine_model.forward(*tensors, keep, plan, None, None))
    return torch.cat(logits).float().log_softmax(-1)


def _eos_token_ids(model: Any) -> list[int]:
    """Those of generation_config.json, or else config.json, that the model has a row for: no other can come."""
    text_config = model.config.get_text_config()
    for config in (getattr(model, "generation_config", None), text_config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            ids = ids if isinstance(ids, list | tuple) else [ids]
            return [int(id) for id in ids if id < text_config.vocab_size]
    return []
