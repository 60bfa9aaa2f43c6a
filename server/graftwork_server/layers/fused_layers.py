"""Decoder layers of the Llama kind computed by two kernel calls each, where those answer what the layers answer.

Between two large products of a decode step stand norms, rotations, the adapters' small products and attention: tens
of calls a layer, each with its own pass over memory. Here a layer is one call up to attention and one from there on;
prompts attend in between, through torch. Layers are recognised by their parts, and a trial compares the whole model's
answers (layers/models/causal.py).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from graftwork_server.kernels.native import NativeKernels
from graftwork_server.kernels.native.kernels import LINEAR_ROWS
from graftwork_server.kernels.native.layer import SLACK_ROWS, LayerStruct, SpansStruct, StepStruct, packed_elements
from graftwork_server.layers.attention import paged
from graftwork_server.layers.attention.kv_cache import KVCache
from graftwork_server.layers.attention.paged import AttentionPlan
from graftwork_server.layers.fused_modules import FusedGatedMLP, FusedNorm
from graftwork_server.layers.linear import AdaptedLinear, LinearGroup, StepRouting
from graftwork_server.layers.routing import Routing

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_MOST_GROUPS, _MOST_DIM, _DIM_STEP = 8, 256, 32
"""What attend_head of layer.h can do."""


@dataclass(frozen=True)
class AttentionSettings:
    """What a layer hands to its attention beside the tensors."""

    scaling: float
    sliding_window: int | None
    softcap: float | None


class _Step:
    """The structures of one forward, and the tensors that they point to."""

    def __init__(
        self, layer: LayerStruct, plan: AttentionPlan, rotary: Any, routing: Routing | None, threads: int
    ) -> None:
        assert plan.native is not None  # the caller looked
        self.rotary = rotary
        cos, sin = (tensor.contiguous() for tensor in rotary)
        rows = len(plan.new_rows)
        hidden, inner, attended = layer.hidden, layer.inner, layer.heads * layer.head_dim
        self.attended = cos.new_empty(rows + SLACK_ROWS, attended)
        self.qkv = cos.new_empty(rows, attended + 2 * layer.kv_heads * layer.head_dim)
        packed = cos.new_empty(packed_elements(rows, max(hidden, inner, attended)))
        normed, product = cos.new_empty(rows + SLACK_ROWS, hidden), cos.new_empty(rows, hidden)
        gate_up, inner_rows = cos.new_empty(rows, 2 * inner), cos.new_empty(rows + SLACK_ROWS, inner)
        spans = routing.layer_spans() if routing is not None else []
        table = (SpansStruct * len(spans))()
        for entry, some in zip(table, spans, strict=True):
            entry.groups, entry.spans = some.block.table.data_ptr(), some.spans.data_ptr()
            entry.n_spans, entry.slot_elements = len(some.spans), some.block.slot_elements
            entry.hidden = some.hidden.data_ptr()
        self._alive = (cos, sin, packed, normed, product, gate_up, inner_rows, spans, table)
        self._struct = StepStruct(
            rows,
            cos.data_ptr(),
            sin.data_ptr(),
            plan.native.description.data_ptr(),
            ctypes.addressof(table),
            len(spans),
            packed.data_ptr(),
            normed.data_ptr(),
            product.data_ptr(),
            gate_up.data_ptr(),
            inner_rows.data_ptr(),
            threads,
        )
        self.address = ctypes.addressof(self._struct)


class FusedLayer:
    """The forward of one decoder layer."""

    def __init__(
        self, layer: Any, struct: LayerStruct, settings: AttentionSettings, step: StepRouting, kernels: NativeKernels
    ) -> None:
        assert kernels.layers is not None  # the caller looked
        self._plain = layer.forward
        self._index: int = layer.self_attn.layer_idx
        self._struct, self._address = struct, ctypes.addressof(struct)
        self._settings = settings
        self._routing = step
        self._threads, self._kernels = kernels.threads, kernels.layers

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [1, rows, hidden] -> [1, rows, hidden]"""
        plan = paged.current_plan()
        rotary = kwargs.get("position_embeddings")
        if (
            plan is None
            or plan.native is None
            or rotary is None
            or self._routing.plain
            or not self._fits(hidden_states)
        ):
            return self._plain(hidden_states, *args, **kwargs)
        step = plan.layer_step
        if step is None or step.rotary is not rotary:
            step = plan.layer_step = _Step(self._struct, plan, rotary, self._routing.tokens, self._threads)
        assert isinstance(plan.cache, KVCache)  # the one that has kernels
        x = hidden_states.contiguous()
        self._kernels.attend(self._address, step.address, plan.cache.layers[self._index], x, step.qkv, step.attended)
        if plan.prefill:
            self._attend_prompts(plan, step)
        y = torch.empty_like(x)
        self._kernels.finish(self._address, step.address, x, step.attended, y)
        return y

    def _fits(self, hidden_states: torch.Tensor) -> bool:
        return self._kernels.has_tiles or hidden_states.shape[1] <= LINEAR_ROWS

    def _attend_prompts(self, plan: AttentionPlan, step: Any) -> None:
        heads, kv_heads, dim = self._struct.heads, self._struct.kv_heads, self._struct.head_dim
        # [rows, heads * dim] -> [heads, rows, dim]
        query, key, value = (
            part.view(len(part), -1, dim).transpose(0, 1)
            for part in step.qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        )
        paged.attend_prompts(
            plan,
            self._index,
            query,
            key,
            value,
            step.attended[: len(step.qkv)].view(-1, heads, dim),
            self._settings.scaling,
            self._settings.sliding_window,
            self._settings.softcap,
        )


def fuse_layers(
    model: Any,
    groups: list[LinearGroup],
    settings: list[AttentionSettings],
    step: StepRouting,
    kernels: NativeKernels,
) -> list[Any]:
    """Gives every layer of `model` that can be computed so a FusedLayer as its forward; these layers.

    `model` is wrapped and its modules are fused; `settings` are by layer.
    """
    if kernels.layers is None:
        return []
    fused = []
    for module in model.modules():
        if {name for name, _ in module.named_children()} != _PARTS:
            continue
        index = getattr(module.self_attn, "layer_idx", -1)
        struct = _struct(module, groups, settings[index]) if 0 <= index < len(settings) else None
        if struct is not None:
            module.forward = FusedLayer(module, struct, settings[index], step, kernels)
            fused.append(module)
    return fused


def _struct(layer: Any, groups: list[LinearGroup], settings: AttentionSettings) -> LayerStruct | None:
    """The layer for the kernels, or None if it is of another kind."""
    attention, mlp = layer.self_attn, layer.mlp
    names = {name for name, _ in attention.named_children()}
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if not (_ATTENTION_PARTS >= names >= {"q_proj", "k_proj", "v_proj", "o_proj"}):
        return None
    if not isinstance(mlp.forward, FusedGatedMLP) or not all(isinstance(norm, FusedNorm) for norm in norms):
        return None
    if settings.softcap is not None or {norm.eps for norm in norms} != {norms[0].eps}:
        return None
    qkv, o, gate_up, down = (
        _group(groups, member) for member in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
    )
    linears = (qkv, o, gate_up, down)
    if [len(group.names) for group in linears] != [3, 1, 2, 1] or not all(group.is_plain for group in linears):
        return None
    dim = getattr(attention, "head_dim", 0)
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    if (q_norm is None) != (k_norm is None):
        return None
    if q_norm is not None and not all(isinstance(n, FusedNorm) and len(n.factors) == dim for n in (q_norm, k_norm)):
        return None
    heads, kv_heads = qkv.out_features[0] // dim if dim else 0, qkv.out_features[1] // dim if dim else 0
    sizes = (qkv.in_features, mlp.gate_proj.out_features)
    fits = dim and dim % _DIM_STEP == 0 and dim <= _MOST_DIM and all(size % 4 == 0 for size in sizes)
    if not fits or heads % kv_heads or heads // kv_heads > _MOST_GROUPS or qkv.out_features[2] != kv_heads * dim:
        return None
    return LayerStruct(
        *(norm.factors.data_ptr() for norm in norms),
        *(norm.factors.data_ptr() if norm is not None else None for norm in (q_norm, k_norm)),
        *(address for group in linears for address in group.addresses()),
        qkv.in_features,
        heads,
        kv_heads,
        dim,
        mlp.gate_proj.out_features,
        settings.sliding_window or 0,
        *(group.index for group in linears),
        norms[0].eps,
        q_norm.eps if q_norm is not None else 0.0,
        settings.scaling,
    )


def _group(groups: list[LinearGroup], linear: AdaptedLinear) -> LinearGroup:
    return next(group for group in groups if linear.base in group.modules)
