"""An encoder made ready for packed forwards with the deltas of many adapters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from graftwork_plugins import HeadLayout
from graftwork_server.kernels.attention import bidirectional, packed
from graftwork_server.kernels.native import NativeKernels
from graftwork_server.layers.changes import hook_changes
from graftwork_server.layers.models.model import EngineModel
from graftwork_server.layers.routing import Routing


class EncoderModel(EngineModel):
    """An encoder without its head, its linears wrapped and its attention over packed rows."""

    def __init__(self, model: torch.nn.Module, layout: HeadLayout, kernels: NativeKernels | None = None) -> None:
        super().__init__(model, kernels)
        any_model: Any = model
        any_model.set_attn_implementation(bidirectional.NAME)
        if getattr(any_model, "pooler", None) is not None:
            any_model.pooler.forward = lambda states: None  # it takes the first packed token for the only sequence's
        embeddings = any_model.embeddings
        counts_from_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
        self.padding_idx: int | None = int(embeddings.padding_idx) if counts_from_padding else None
        """RoBERTa: positions begin behind this one, and tokens with this id do not count."""
        self.token_types = int(getattr(any_model.config, "type_vocab_size", 0))
        """How many types of tokens it knows; up to 1: it takes no token_type_ids."""
        if layout.trunk_dense is not None:
            self.head_modules = (layout.trunk_dense,)
            for group in self.groups:
                group.is_output = group.names == [layout.trunk_dense]

    def states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        cu_seqlens: SequenceOf[int],
        tokens: Routing | None,
    ) -> torch.Tensor:
        """input_ids, position_ids, token_type_ids [tokens] of whole sequences -> hidden states [tokens, hidden]."""
        types = {"token_type_ids": token_type_ids[None].clamp(max=self.token_types - 1)} if self.token_types > 1 else {}
        self.step.tokens = tokens or None
        hooks = hook_changes(self.changeable, tokens.changed, ()) if tokens is not None else []
        try:
            with packed.packed_rows(cu_seqlens):
                output = self.model(input_ids=input_ids[None], position_ids=position_ids[None], **types)
        finally:
            for hook in hooks:
                hook.remove()
            for group in self.groups:
                group.forget()
        states: torch.Tensor = output[0][0]
        return states

    def before_head(self, states: torch.Tensor, outputs: Routing | None) -> torch.Tensor:
        """states [n, hidden] through the layer of the base that stands before a head, routed by `outputs`."""
        self.step.outputs = outputs or None
        hooks = hook_changes(self.changeable, (), outputs.changed) if outputs is not None else []
        try:
            result: torch.Tensor = self.model.get_submodule(self.head_modules[0])(states.to(self.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        return result.float()

    def positions(self, tokens: SequenceOf[int]) -> list[int]:
        """The position ids that the model gives the tokens of one sequence."""
        if self.padding_idx is None:
            return list(range(len(tokens)))
        counts = itertools.accumulate(int(token != self.padding_idx) for token in tokens)
        pad = self.padding_idx
        return [pad if token == pad else pad + count for token, count in zip(tokens, counts, strict=True)]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        return dtype
