"""PEFT's adapter_config.json for LoRA, IA3 and prompt learning, and PEFT's rules for which modules it means.

The document comes from a client. Nothing in it names code to run: which keys are accepted is said in keys.py, and
patterns are matched within limits (patterns.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwork_plugins import BaseInfo
from graftwork_plugins.peft_format.keys import (
    DESCRIPTIVE,
    LORA_DESCRIPTIVE,
    LORA_DETAILS,
    check_auto_mapping,
    refuse_unknown,
)
from graftwork_plugins.peft_format.module_names import is_within, modules_named
from graftwork_plugins.peft_format.patterns import MAX_NAMES, PatternMatcher
from graftwork_plugins.peft_format.values import (
    read_flag,
    read_list_of_names,
    read_names,
    read_number,
    read_numbers,
    require,
)

TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
"""Values of LoRA's task_type that are served; the last two say which class of transformers' names the modules."""

LABEL_KEYS = frozenset({"id2label", "label2id", "num_labels", "problem_type"})
"""Keys of a classifier's configuration that adapter_config.json may have too (lora_tasks.py)."""

EMBEDDING_PROMPTS = ("PROMPT_TUNING", "P_TUNING")
"""Values of peft_type whose virtual tokens are embeddings."""
PROMPTS = (*EMBEDDING_PROMPTS, "PREFIX_TUNING")
"""Values of peft_type that put virtual tokens before the prompt."""

_TIED_NAMES = ("embed_tokens", "lm_head")
"""Names of layers for which PEFT heeds ensure_weight_tying."""

_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica"}
"""Initialisations that leave the base's weights as they were; PiSSA, OLoRA, LoftQ, CorDA and others change them."""

_LORA_KEYS = frozenset(
    """
    peft_type task_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules
    init_lora_weights layers_to_transform layers_pattern use_dora lora_bias bias modules_to_save trainable_token_indices
    ensure_weight_tying target_parameters
    """.split()  # noqa: SIM905 - one name a line would fill a page
)
_IA3_KEYS = frozenset(
    """
    peft_type task_type target_modules exclude_modules feedforward_modules modules_to_save init_ia3_weights
    """.split()  # noqa: SIM905 - as above
)
_PROMPT_KEYS = frozenset(
    """
    peft_type task_type num_virtual_tokens token_dim num_layers num_attention_heads num_transformer_submodules
    """.split()  # noqa: SIM905 - as above
)
_PROMPT_TRAINING = frozenset(
    """
    prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs encoder_hidden_size prefix_projection init_weights
    encoder_reparameterization_type encoder_num_layers
    """.split()  # noqa: SIM905 - as above
)
"""Keys that matter in training alone: PEFT saves what its encoders and projections give."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which modules of the base an adapter of any kind changes."""

    target_modules: str | Sequence[str] | None
    """Names, or a regular expression."""
    exclude_modules: str | Sequence[str] | None
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    """Modules that the adapter has whole, by the ends of their names."""
    ensure_weight_tying: bool = False
    matcher: PatternMatcher = field(default_factory=PatternMatcher, compare=False)
    """Matches all patterns of this document, so that one limit of time is for all."""

    def targets(self, base: BaseInfo) -> list[str]:
        """Linear layers and embeddings that the configuration names, by PEFT's rules. Raises PatternError."""
        modules = [*base.linear_modules, *base.embedding_modules]
        return [module for module in modules if self._is_target(module, base)]

    def is_saved_whole(self, module: str) -> bool:
        """Whether `module`, or one that it is part of, is among modules_to_save."""
        return any(is_within(module, name) for name in self.modules_to_save)

    def ties_saved_modules(self) -> bool:
        """Whether PEFT gives a saved input embedding to the layers tied to it too."""
        return self.ensure_weight_tying and any(n.split(".")[-1] in _TIED_NAMES for n in self.modules_to_save)

    def ties_targets(self) -> bool:
        """Whether PEFT gives the update of the input embedding to the layers tied to it too. Raises PatternError."""
        targets = self.target_modules
        if not self.ensure_weight_tying or targets is None:
            return False
        if isinstance(targets, str):
            return any(self.matcher.fullmatch(targets, name) for name in _TIED_NAMES)
        return any(name.split(".")[-1] in _TIED_NAMES for name in targets)

    def _is_target(self, module: str, base: BaseInfo) -> bool:
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            if self.matcher.fullmatch(excluded, module):
                return False
        elif excluded and modules_named(excluded, [module]):
            return False
        if self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module in base.linear_modules and module != base.output_module
            return self.matcher.fullmatch(self.target_modules, module)
        if module in self.target_modules:
            return True
        return bool(modules_named(self.target_modules, [module])) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        parts = module.split(".")
        numbers = [position for position, part in enumerate(parts[:-1]) if part.isdigit() and position > 0]
        for pattern in self.layers_pattern or [""]:
            for position in numbers:
                container = ".".join(parts[:position])
                # Without a pattern, the first number after two parts.
                if self.matcher.first_match([pattern], container) if pattern else position > 1:
                    return int(parts[position]) in self.layers_to_transform
        return False


@dataclass(frozen=True)
class LoraPatterns:
    """Rank and scale of LoRA's updates by module."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    matcher: PatternMatcher = field(default_factory=PatternMatcher, compare=False)

    def rank(self, module: str) -> int:
        """Rank of a module's update."""
        return self._choose(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank = self.rank(module)
        alpha = self._choose(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _choose(self, pattern: Mapping[str, Any], module: str, default: Any) -> Any:
        if not pattern:
            return default
        key = self.matcher.first_match(pattern, module)
        # Like PEFT: a key that is the name itself counts even where it does not match itself as an expression.
        return pattern[key] if key is not None else pattern.get(module, default)


@dataclass(frozen=True, kw_only=True)
class LoraAdapterConfig(AdapterConfig):
    """What matters to serving of a LoRA adapter's configuration."""

    patterns: LoraPatterns
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    """Which of the base's biases are saved with the adapter: none, all, or lora_only (of adapted layers)."""
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    """Tokens with rows of their own in the input embedding, or in modules by the ends of their names."""
    target_parameters: Sequence[str] = ()
    """Stacked parameters of experts, by the ends of their names."""
    task_type: str | None = None
    """Which of transformers' models PEFT wrapped; None if it was not said."""


@dataclass(frozen=True, kw_only=True)
class Ia3AdapterConfig(AdapterConfig):
    """What matters to serving of an IA3 adapter's configuration."""

    feedforward_modules: str | Sequence[str]

    def scales_input(self, module: str) -> bool:
        """Whether the factors are for the layer's input, not its output. Raises PatternError."""
        if isinstance(self.feedforward_modules, str):
            return self.matcher.fullmatch(self.feedforward_modules, module)
        # PEFT compares the ends of names as text.
        return module.endswith(tuple(self.feedforward_modules))


@dataclass(frozen=True)
class PromptConfig:
    """The sizes of the virtual tokens of prompt tuning, P-tuning (embeddings) or prefix tuning (keys and values)."""

    are_embeddings: bool
    num_virtual_tokens: int
    token_dim: int
    """Size of an embedding, or of one token's keys in a layer, all heads together."""
    num_layers: int = 0
    """0 for embeddings."""
    num_attention_heads: int = 0
    """0 for embeddings."""


def read_lora_config(document: Mapping[str, Any]) -> LoraAdapterConfig:
    """`document` as far as it can be served. Raises ArtifactError naming the key that cannot, and what could."""
    _check_lora_options(document)
    rank_pattern = read_numbers(document, "rank_pattern", integers=True)
    alpha_pattern = read_numbers(document, "alpha_pattern", integers=False)
    r = read_number(document, "r", 8, integer=True)
    alpha = read_number(document, "lora_alpha", 8, integer=False)
    use_rslora = read_flag(document, "use_rslora")
    layers = document.get("layers_to_transform") or []
    layers = layers if isinstance(layers, list) else [layers]
    fits = len(layers) <= MAX_NAMES and all(type(layer) is int for layer in layers)
    require(document, "layers_to_transform", fits, f"up to {MAX_NAMES} layer numbers, or null")
    containers = read_names(document, "layers_pattern") or []
    ranks = {name: int(rank) for name, rank in rank_pattern.items()}
    matcher = PatternMatcher()
    return LoraAdapterConfig(
        patterns=LoraPatterns(int(r), alpha, ranks, alpha_pattern, use_rslora, matcher),
        matcher=matcher,
        target_modules=read_names(document, "target_modules"),
        exclude_modules=read_names(document, "exclude_modules"),
        layers_to_transform=layers or None,
        layers_pattern=[containers] if isinstance(containers, str) else containers,
        use_dora=read_flag(document, "use_dora"),
        lora_bias=read_flag(document, "lora_bias"),
        bias=document.get("bias", "none"),
        modules_to_save=read_list_of_names(document, "modules_to_save"),
        trainable_token_indices=_read_token_indices(document),
        ensure_weight_tying=read_flag(document, "ensure_weight_tying"),
        target_parameters=read_list_of_names(document, "target_parameters"),
        task_type=document.get("task_type"),
    )


def _check_lora_options(document: Mapping[str, Any]) -> None:
    """The keys with few accepted values, and those that nobody knows."""
    require(document, "peft_type", document.get("peft_type") == "LORA", "LORA")
    require(document, "task_type", document.get("task_type") in (None, *TASK_TYPES), f"{', '.join(TASK_TYPES)} or null")
    bias = document.get("bias", "none")
    require(document, "bias", bias in ("none", "all", "lora_only"), '"none", "all" or "lora_only"')
    init = document.get("init_lora_weights", True)
    require(
        document,
        "init_lora_weights",
        init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS),
        "true, false, gaussian, eva, orthogonal or mica; others change the base's weights, so convert the adapter "
        "first (path_initial_model_for_weight_conversion)",
    )
    check_auto_mapping(document)
    require(
        document, "megatron_core", document.get("megatron_core") in (None, "megatron.core"), "megatron.core or null"
    )
    labels = LABEL_KEYS if document.get("task_type") == "SEQ_CLS" else frozenset()
    refuse_unknown(document, _LORA_KEYS | DESCRIPTIVE | LORA_DESCRIPTIVE | LORA_DETAILS | labels)


def _read_token_indices(document: Mapping[str, Any]) -> list[int] | dict[str, list[int]]:
    value = document.get("trainable_token_indices") or []
    lists = list(value.values()) if isinstance(value, dict) else [value]
    fits = len(lists) <= MAX_NAMES and all(
        isinstance(tokens, list) and all(type(token) is int for token in tokens) for tokens in lists
    )
    accepted = f"a list of token ids, an object of up to {MAX_NAMES} such lists by module name, or null"
    require(document, "trainable_token_indices", fits, accepted)
    result: list[int] | dict[str, list[int]] = value
    return result


def read_ia3_config(document: Mapping[str, Any]) -> Ia3AdapterConfig:
    """`document` as far as it can be served. Raises ArtifactError naming the key that cannot, and what could."""
    require(document, "peft_type", document.get("peft_type") == "IA3", "IA3")
    require(document, "task_type", document.get("task_type") in (None, "CAUSAL_LM"), "CAUSAL_LM or null")
    check_auto_mapping(document)
    require(document, "target_modules", document.get("target_modules") is not None, "names, or a regular expression")
    refuse_unknown(document, _IA3_KEYS | DESCRIPTIVE)
    return Ia3AdapterConfig(
        target_modules=read_names(document, "target_modules"),
        exclude_modules=read_names(document, "exclude_modules"),
        modules_to_save=read_list_of_names(document, "modules_to_save"),
        feedforward_modules=read_names(document, "feedforward_modules") or [],
    )


def read_prompt_config(document: Mapping[str, Any]) -> PromptConfig:
    """`document` as far as it can be served. Raises ArtifactError naming the key that cannot, and what could."""
    require(document, "peft_type", document.get("peft_type") in PROMPTS, ", ".join(PROMPTS))
    require(document, "task_type", document.get("task_type") in (None, "CAUSAL_LM"), "CAUSAL_LM or null")
    submodules = document.get("num_transformer_submodules")
    require(document, "num_transformer_submodules", submodules in (None, 1), "1 or null")
    check_auto_mapping(document)
    refuse_unknown(document, _PROMPT_KEYS | _PROMPT_TRAINING | DESCRIPTIVE)
    are_embeddings = document["peft_type"] in EMBEDDING_PROMPTS
    sizes = ["num_virtual_tokens", "token_dim"]
    sizes += [] if are_embeddings else ["num_layers", "num_attention_heads"]
    for key in sizes:
        value = document.get(key)
        require(document, key, type(value) is int and 0 < value <= 1_048_576, "a whole number from 1")
    return PromptConfig(are_embeddings, **{key: document[key] for key in sizes})
