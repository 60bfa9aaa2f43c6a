"""A transformers model made ready for packed forwards with the deltas of many adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from graftwork_server.kernels.attention.rotary import rope_borders, sequence_lengths
from graftwork_server.kernels.native import NativeKernels
from graftwork_server.layers.attention import paged
from graftwork_server.layers.attention.paged import AttentionPlan
from graftwork_server.layers.changes import ChangeableModule, hook_changes
from graftwork_server.layers.fused_layers import AttentionSettings, fuse_layers
from graftwork_server.layers.fused_modules import fuse_modules
from graftwork_server.layers.linear import LinearGroup, StepRouting, wrap_linears
from graftwork_server.layers.routing import Routing

if TYPE_CHECKING:
    from graftwork_server.kernels.triton.kernels import TritonKernels


class EngineModel:
    """A transformers model whose linears are wrapped and whose attention is the paged one."""

    def __init__(self, model: torch.nn.Module, kernels: NativeKernels | None = None) -> None:
        self.model = model
        self.kernels = kernels
        self.triton: TritonKernels | None = None
        """The kernels of a base on CUDA."""
        self.step = StepRouting()
        self.groups: list[LinearGroup] = wrap_linears(model, self.step, kernels)
        if kernels is not None:
            fuse_modules(model, kernels)
        self.fused_layers: list[torch.nn.Module] = []
        """Layers that kernels compute whole (fused_layers.py)."""
        self.changeable: dict[str, ChangeableModule] = {}
        """Modules that adapters may change beyond low-rank products; the base's probe fills it in."""
        self.head_modules: tuple[str, ...] = ()
        """Linear layers that stand before a head: BERT's pooler."""
        self.missing_modules: tuple[str, ...] = ()
        """Those of them that the checkpoint has no weights for."""
        self.rope_borders = rope_borders(model)
        """Lengths up to which a sequence has other rotary frequencies than beyond (kernels/attention/rotary.py)."""
        model.set_attn_implementation(paged.NAME)  # type: ignore[operator]

    def fuse_layers(self, settings: list[AttentionSettings]) -> None:
        """Has kernels compute whole layers where they can; `settings` are by layer."""
        if self.kernels is not None:
            self.fused_layers = fuse_layers(self.model, self.groups, settings, self.step, self.kernels)

    def unfuse_layers(self) -> None:
        """Undoes fuse_layers."""
        for layer in self.fused_layers:
            del layer.forward
        self.fused_layers = []

    @property
    def trunk(self) -> torch.nn.Module:
        """What answers with the last hidden states, after the final norm."""
        trunk: torch.nn.Module = self.model.base_model  # type: ignore[assignment]
        return trunk

    @property
    def hidden_size(self) -> int:
        """Size of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        keep: torch.Tensor,
        plan: AttentionPlan,
        tokens: Routing | None,
        outputs: Routing | None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids and position_ids [tokens], keep [kept] rows to make logits of -> logits [kept, vocabulary].

        `tokens` routes the packed rows and `outputs` the kept ones; None where no row has an adapter.
        lengths [tokens]: of the sequence that each row belongs to; None: each row is its sequence's last one.
        """
        self.step.tokens = tokens or None
        self.step.outputs = outputs or None
        self.step.plain = tokens is not None and bool(tokens.changed)
        hooks = []
        if tokens is not None and tokens.changed:
            hooks = hook_changes(self.changeable, tokens.changed, outputs.changed if outputs is not None else ())
        paged.set_plan(plan)
        try:
            with sequence_lengths(position_ids + 1 if lengths is None else lengths):
                output = self.model(
                    input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, logits_to_keep=keep
                )
        finally:
            paged.set_plan(None)
            for hook in hooks:
                hook.remove()
            for group in self.groups:
                group.forget()
        return output.logits[0]
