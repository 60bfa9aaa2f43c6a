"""The base's probe: a few short rows, run one by one as transformers does and packed as they are served.

Two rows stand at the beginning of the context and one at its end, so that what a model derives from the longest
position of a forward (LongRoPE's factors) would show.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.attention import packed
from graftwork_server.layers.attention.kv_cache import LayerShape
from graftwork_server.layers.changes import record_row_dims
from graftwork_server.layers.fused_layers import AttentionSettings

PROBE_ROWS = ([3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8])
"""At the beginning of the context. 13 tokens, and 23 with _LAST_ROW: numbers that no dimension of a model is likely to
have, see record_row_dims."""
_LAST_ROW = [1, 6, 1, 8, 0, 3, 3, 9, 8, 8]
_EXACT_TOLERANCE = 2e-3
"""Largest difference of what a model answers, packed against one by one, in float32."""
_RECORDED = "graftwork_probe"
"""Name of the attention that records what layers hand to it."""
_LONGEST_LOOK = 1 << 20
"""Tokens of the context of which the mask is looked at."""


def probe_layers(model: Any) -> tuple[list[LayerShape], list[AttentionSettings]]:
    """Runs two tokens and records each attention layer's key and value shapes, and what it hands to attention.

    Raises FailedPrecondition if the model does not send all its attention through transformers' attention interface, or
    means other tokens to be seen than what it hands over says.
    """
    seen: dict[int, LayerShape] = {}
    settings: dict[int, AttentionSettings] = {}
    unknown: set[str] = set()
    context = min(int(model.config.get_text_config().max_position_embeddings), _LONGEST_LOOK)

    def record(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        known = {"scaling", "dropout", "sliding_window", "softcap", "is_causal", "position_ids", "use_cache"}
        unknown.update(name for name, given in kwargs.items() if name not in known and _matters(name, given))
        seen[module.layer_idx] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        window = kwargs.get("sliding_window")
        settings[module.layer_idx] = AttentionSettings(scaling, window, kwargs.get("softcap"))
        if mask is not None and not torch.equal(mask.flatten(), _window(context, window, mask.device)):
            unknown.add(f"a mask that is not that of sliding_window {window}")
        return packed.packed_attention(module, query, key, value, None, **kwargs)

    ids = torch.tensor([[1, 0]], device=model.device)
    AttentionInterface.register(_RECORDED, record)
    AttentionMaskInterface.register(_RECORDED, partial(_last_row, context))
    before = model.config._attn_implementation
    model.set_attn_implementation(_RECORDED)
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(seen) != list(range(layers)) or unknown:
        why = f"its attention takes {', '.join(sorted(unknown))}" if unknown else "not every layer has plain attention"
        raise FailedPrecondition(
            f"{type(model).__name__} cannot be served: {why}; served are causal models whose layers all use "
            "transformers' attention interface",
            reason="MODEL_UNSUPPORTED",
        )
    return [seen[index] for index in range(layers)], [settings[index] for index in range(layers)]


def _last_row(context: int, *, mask_function: Any, device: Any = "cpu", **_: Any) -> torch.Tensor:
    """transformers' mask interface: which of the context's tokens its last one sees, [1, 1, 1, context] bool."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    try:
        visible = mask_function(zero, zero, zero + context - 1, torch.arange(context, device=device))
        return torch.broadcast_to(visible, (1, 1, 1, context))
    except Exception:  # a function that takes no such indices is none of the plain ones
        return torch.zeros(1, 1, 1, context, dtype=torch.bool, device=device)


def _window(context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[context] bool: what the last token sees as causal_attention has it."""
    return torch.arange(context, device=device) >= context - (window or context)


def _matters(name: str, given: Any) -> bool:
    """Attention sinks and the like change the result; tensors and flags that only inform do not."""
    return name in {"s_aux", "sinks", "position_bias", "alibi"} and given is not None


def _rows(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and positions of the probe's rows, [tokens] each."""
    config = model.config.get_text_config()
    starts = [0, 0, max(0, int(config.max_position_embeddings) - len(_LAST_ROW))]
    return [
        (
            torch.tensor(row, device=model.device) % config.vocab_size,
            torch.arange(start, start + len(row), device=model.device),
        )
        for row, start in zip((*PROBE_ROWS, _LAST_ROW), starts, strict=True)
    ]


def logprobs_alone(model: Any) -> torch.Tensor:
    """Log probabilities of the rows run one by one with torch's own attention: [tokens, vocabulary]."""
    before = model.config._attn_implementation
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        try:
            logits = [
                model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
                for ids, positions in _rows(model)
            ]
        finally:
            model.set_attn_implementation(before)
    return torch.cat(logits).float().log_softmax(-1)


def logprobs_packed(model: Any) -> tuple[torch.Tensor, dict[str, int]]:
    """Log probabilities of the rows packed into one forward, as those of logprobs_alone, and which dimension of each
    module's output holds the rows (record_row_dims)."""
    rows = _rows(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(packed.NAME)
    ids, positions = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
    row_dims, hooks = record_row_dims(model, len(ids))
    cu_seqlens = [0, *itertools.accumulate(len(ids) for ids, _ in rows)]
    try:
        with torch.inference_mode(), packed.packed_rows(cu_seqlens):
            output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
    return output.logits[0].float().log_softmax(-1), row_dims


def check_packing(
    architecture: str, what: str, differences: Sequence[torch.Tensor], *, exact: bool, rounded_mean: float
) -> None:
    """Raises FailedPrecondition (MODEL_UNSUPPORTED) where packing sequences into one forward changed `what` the model
    answers: it would be served wrong answers (a layer that mixes tokens outside attention, say).

    exact: computed in float32, where single values are looked at. rounded_mean: what coarser dtypes may differ by, as a
    mean: rounding alone moves single values further."""
    difference = max((values.max() if exact else values.mean()).item() for values in differences)
    if not difference <= (_EXACT_TOLERANCE if exact else rounded_mean):
        raise FailedPrecondition(
            f"{architecture} cannot be served: packing sequences into one forward changes its {what} by "
            f"{difference:.2g}",
            reason="MODEL_UNSUPPORTED",
        )
