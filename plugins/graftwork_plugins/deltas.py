"""Deltas: the pure data that a strategy hands the engine for serving.

A strategy decides what a variant is; the engine alone decides how it is computed. Further kinds and further optional
fields are added beside these; none is ever changed. All tensors are on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """y += scaling * (x A^T) B^T on one module (LoRA, arXiv:2106.09685).

    `scaling` is the whole factor: alpha / r for LoRA, alpha / sqrt(r) for rsLoRA. On an embedding, x is the one-hot row
    of the token: in_features is the number of embeddings, out_features their size, and what the layer scales its
    output by (Gemma) scales the update too.
    """

    module: str
    """Dotted name of the base's module, as in named_modules(): "model.layers.0.self_attn.q_proj"."""
    a: torch.Tensor
    """[rank, in_features], floating point; [experts, rank, in_features] for a stacked `parameter`."""
    b: torch.Tensor
    """[out_features, rank], floating point; [experts, out_features, rank] for a stacked `parameter`."""
    scaling: float
    bias: torch.Tensor | None = None
    """[out_features]: scaling * bias is added too. Linear layers only."""
    magnitude: torch.Tensor | None = None
    """[out_features], DoRA (arXiv:2402.09353): the rows of W + scaling * B A, whose norms the engine computes from its
    own W, are scaled to these norms. The bias of the base is not scaled."""
    parameter: str | None = None
    """Name of a parameter of a mixture of experts that the update is for: of the experts, stacked [experts,
    out_features, in_features] ("gate_up_proj", "down_proj"), or of the router, [out_features, in_features] ("weight").
    None: the weight of a linear layer or embedding."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Multiplies what goes into or comes out of one linear layer, element by element (IA3, arXiv:2205.05638)."""

    module: str
    factors: torch.Tensor
    """[in_features] for the input, [out_features] for the output, floating point."""
    of: Literal["input", "output"]
    """input: y = W (factors * x) + bias; output: y = factors * (W x + bias)."""


@dataclass(frozen=True, kw_only=True)
class Replace:
    """Other values for parameters of one module, seen by the variant's own tokens alone.

    Any linear layer, embedding or norm. A weight that the base ties to another is replaced in this module only.
    """

    module: str
    tensors: Mapping[str, torch.Tensor]
    """By the parameter's own name ("weight", "bias"), in the base's shape; with `rows`, "weight" alone."""
    rows: Sequence[int] | None = None
    """Of an embedding, the tokens, or of a linear layer, the outputs, that are replaced: "weight" then is [rows, size].
    None: all."""
    copy_of_base: bool = False
    """The tensors are copies of the base's own (PEFT saves such): refused if they differ, else nothing to serve."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Virtual tokens before a sequence's first: either as embeddings (prompt tuning, arXiv:2104.08691) or as keys and
    values of each layer (prefix tuning, arXiv:2101.00190). They take the first positions; the sequence's own tokens
    begin behind them."""

    embeddings: torch.Tensor | None = None
    """[virtual tokens, hidden_size], what the first decoder layer takes. None if keys and values are given."""
    keys: Sequence[torch.Tensor] = ()
    """For each layer [kv_heads, virtual tokens, head_dim], as they stand in the KV cache (rotated where the model
    rotates)."""
    values: Sequence[torch.Tensor] = ()
    """For each layer [kv_heads, virtual tokens, head_dim]."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A classifier over one hidden state of each sequence, in the place of the layer that makes the next token's
    logits: weight * activation(dense * state + dense_bias) + bias, or weight * state + bias without a dense layer.

    Goes with every delta of modules. A variant that has one answers Classify, and does not generate.
    """

    weight: torch.Tensor
    """[labels, hidden_size]"""
    bias: torch.Tensor | None = None
    """[labels]"""
    pooling: Literal["last", "cls", "mean"] = "last"
    """Whose state it is: of the last token that is no padding, of the first, or the mean of all."""
    pad_token_id: int | None = None
    """With pooling "last", this token counts as padding."""
    labels: Sequence[str] = ()
    """A name for each row of `weight`; empty: LABEL_0, LABEL_1, ..."""
    problem_type: ProblemType | None = None
    """As in transformers. None: regression for one label, single_label_classification for several."""
    dense_module: str | None = None
    """Name of a linear layer of the base that is the dense layer, with what other deltas do to it: BERT's pooler."""
    dense_weight: torch.Tensor | None = None
    """[features, hidden_size]: a dense layer of the variant's own; `weight` then is [labels, features]."""
    dense_bias: torch.Tensor | None = None
    """[features]"""
    activation: Literal["tanh", "relu", "gelu"] = "tanh"
    """What follows the dense layer."""


@dataclass(frozen=True, kw_only=True)
class FullWeights:
    """A whole tuned checkpoint of the base's architecture. Tensors equal to the base's are not held twice."""

    tensors: Mapping[str, torch.Tensor]
    """By name, as in the base's state_dict(); every parameter of the base, tied ones under either name or, where this
    checkpoint does not tie them, under both."""


Delta = LowRank | Scale | Replace | Prefix | Head | FullWeights
