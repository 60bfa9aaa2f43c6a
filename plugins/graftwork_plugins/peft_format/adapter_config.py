"""PEFT's adapter_config.json for LoRA and IA3, and PEFT's rules for which module it means.

The document comes from a client. Nothing in it names code to run: which keys are accepted is said in keys.py, and
patterns are matched within limits (patterns.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwork_plugins.peft_format.keys import (
    DESCRIPTIVE,
    LORA_DESCRIPTIVE,
    LORA_DETAILS,
    check_auto_mapping,
    refuse_unknown,
    require,
    shown,
)
from graftwork_plugins.peft_format.patterns import MAX_NAMES, PatternMatcher
from graftwork_plugins.strategy import ArtifactError, BaseInfo

_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica"}
"""Initialisations that leave the base's weights as they were; PiSSA, OLoRA, LoftQ, CorDA and others change them."""

TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
"""Values of task_type that are served; the last two say which class of transformers' names the modules."""

LABEL_KEYS = frozenset({"id2label", "label2id", "num_labels", "problem_type"})
"""Keys of a classifier's configuration that adapter_config.json may have too (heads.py)."""

_TIED_NAMES = ("embed_tokens", "lm_head")
"""Names of layers for which PEFT heeds ensure_weight_tying."""


@dataclass(frozen=True)
class LoraPatterns:
    """Rank and scale by module."""

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


@dataclass(frozen=True)
class AdapterConfig:
    """What of adapter_config.json matters to serving."""

    patterns: LoraPatterns
    target_modules: str | Sequence[str] | None
    exclude_modules: str | Sequence[str] | None
    layers_to_transform: Sequence[int] | None
    layers_pattern: list[str]
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    """Which of the base's biases are saved with the adapter: none, all, or lora_only (of adapted layers)."""
    modules_to_save: Sequence[str] = ()
    """Modules that the adapter has whole, by the ends of their names."""
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    """Tokens with rows of their own in the input embedding, or in modules by the ends of their names."""
    ensure_weight_tying: bool = False
    target_parameters: Sequence[str] = ()
    """Stacked parameters of experts, by the ends of their names."""
    task_type: str | None = None
    """Which of transformers' models PEFT wrapped; None if it was not said."""

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
            return any(self.patterns.matcher.fullmatch(targets, name) for name in _TIED_NAMES)
        return any(name.split(".")[-1] in _TIED_NAMES for name in targets)

    def _is_target(self, module: str, base: BaseInfo) -> bool:
        matcher = self.patterns.matcher
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            if matcher.fullmatch(excluded, module):
                return False
        elif excluded and targets_of_names(excluded, [module]):
            return False
        if self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module in base.linear_modules and module != base.output_module
            return matcher.fullmatch(self.target_modules, module)
        if module in self.target_modules:
            return True
        return bool(targets_of_names(self.target_modules, [module])) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        parts = module.split(".")
        numbers = [position for position, part in enumerate(parts[:-1]) if part.isdigit() and position > 0]
        for pattern in self.layers_pattern or [""]:
            for position in numbers:
                container = ".".join(parts[:position])
                # Without a pattern, the first number after two parts.
                if self.patterns.matcher.first_match([pattern], container) if pattern else position > 1:
                    return int(parts[position]) in self.layers_to_transform
        return False


def is_within(module: str, name: str) -> bool:
    """Whether `module` is meant by `name` in modules_to_save, or is part of one that is.

    PEFT compares the ends of names as text: "norm" means "input_layernorm" too."""
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts) + 1))


def targets_of_names(names: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Modules that are named in full or by their last dotted parts."""
    wanted = set(names)
    return [module for module in modules if any(".".join(parts) in wanted for parts in _endings(module.split(".")))]


def _endings(parts: list[str]) -> Iterable[list[str]]:
    return (parts[start:] for start in range(len(parts)))


def read_adapter_config(document: Mapping[str, Any]) -> AdapterConfig:
    """`document` as far as it can be served. Raises ArtifactError naming the key that cannot, and what could."""
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
    classifies = document.get("task_type") == "SEQ_CLS"
    refuse_unknown(
        document, _READ | DESCRIPTIVE | LORA_DESCRIPTIVE | LORA_DETAILS | (LABEL_KEYS if classifies else frozenset())
    )
    rank_pattern = _numbers(document, "rank_pattern", integers=True)
    alpha_pattern = _numbers(document, "alpha_pattern", integers=False)
    r = _number(document, "r", document.get("r", 8), integers=True)
    alpha = _number(document, "lora_alpha", document.get("lora_alpha", 8), integers=False)
    rslora = _flag(document, "use_rslora")
    layers = document.get("layers_to_transform") or []
    layers = layers if isinstance(layers, list) else [layers]
    fits = len(layers) <= MAX_NAMES and all(type(layer) is int for layer in layers)
    require(document, "layers_to_transform", fits, f"up to {MAX_NAMES} layer numbers, or null")
    containers = _names(document, "layers_pattern") or []
    return AdapterConfig(
        patterns=LoraPatterns(int(r), alpha, {k: int(v) for k, v in rank_pattern.items()}, alpha_pattern, rslora),
        target_modules=_names(document, "target_modules"),
        exclude_modules=_names(document, "exclude_modules"),
        layers_to_transform=layers or None,
        layers_pattern=[containers] if isinstance(containers, str) else containers,
        use_dora=_flag(document, "use_dora"),
        lora_bias=_flag(document, "lora_bias"),
        bias=bias,
        modules_to_save=read_modules_to_save(document),
        trainable_token_indices=_token_indices(document),
        ensure_weight_tying=_flag(document, "ensure_weight_tying"),
        target_parameters=_list_of_names(document, "target_parameters"),
        task_type=document.get("task_type"),
    )


def read_modules_to_save(document: Mapping[str, Any]) -> list[str]:
    """modules_to_save as a list. Raises ArtifactError."""
    return _list_of_names(document, "modules_to_save")


def _list_of_names(document: Mapping[str, Any], key: str) -> list[str]:
    value = document.get(key) or []
    fits = isinstance(value, list) and len(value) <= MAX_NAMES and all(isinstance(n, str) and n for n in value)
    require(document, key, fits, f"a list of up to {MAX_NAMES} names, or null")
    return list(value)


def _token_indices(document: Mapping[str, Any]) -> list[int] | dict[str, list[int]]:
    value = document.get("trainable_token_indices") or []
    lists = list(value.values()) if isinstance(value, dict) else [value]
    fits = len(lists) <= MAX_NAMES and all(
        isinstance(tokens, list) and all(type(token) is int for token in tokens) for tokens in lists
    )
    accepted = f"a list of token ids, an object of up to {MAX_NAMES} such lists by module name, or null"
    require(document, "trainable_token_indices", fits, accepted)
    result: list[int] | dict[str, list[int]] = value
    return result


def _flag(document: Mapping[str, Any], key: str) -> bool:
    value = document.get(key)
    require(document, key, value is None or isinstance(value, bool), "true or false")
    return bool(value)


def read_ia3_config(document: Mapping[str, Any]) -> tuple[AdapterConfig, str | list[str]]:
    """PEFT's adapter_config.json for IA3, and its feedforward_modules. Raises ArtifactError."""
    require(document, "peft_type", document.get("peft_type") == "IA3", "IA3")
    require(document, "task_type", document.get("task_type") in (None, "CAUSAL_LM"), "CAUSAL_LM or null")
    check_auto_mapping(document)
    require(document, "target_modules", document.get("target_modules") is not None, "names, or a regular expression")
    refuse_unknown(document, _IA3 | DESCRIPTIVE)
    config = AdapterConfig(
        patterns=LoraPatterns(1, 1.0, {}, {}, False),
        target_modules=_names(document, "target_modules"),
        exclude_modules=_names(document, "exclude_modules"),
        layers_to_transform=None,
        layers_pattern=[],
        modules_to_save=read_modules_to_save(document),
    )
    return config, _names(document, "feedforward_modules") or []


_IA3 = frozenset(
    """
    peft_type task_type target_modules exclude_modules feedforward_modules modules_to_save init_ia3_weights
    """.split()  # noqa: SIM905 - one name a line would fill a page
)

_READ = frozenset(
    """
    peft_type task_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules
    init_lora_weights layers_to_transform layers_pattern use_dora lora_bias bias modules_to_save trainable_token_indices
    ensure_weight_tying target_parameters
    """.split()  # noqa: SIM905 - one name a line would fill a page
)


def _number(document: Mapping[str, Any], key: str, value: Any, *, integers: bool) -> float:
    kinds = int if integers else int | float
    fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and 0 < value <= 65_536
    if not fits:
        accepted = "a whole number" if integers else "a number"
        raise ArtifactError(key, f"adapter_config.json: {key} has {shown(value)}; accepted: {accepted} up to 65536")
    return float(value)


def _numbers(document: Mapping[str, Any], key: str, *, integers: bool) -> dict[str, float]:
    value = document.get(key) or {}
    fits = isinstance(value, dict) and len(value) <= MAX_NAMES
    require(document, key, fits, f"an object of up to {MAX_NAMES} numbers by module name")
    return {name: _number(document, key, number, integers=integers) for name, number in value.items()}


def _names(document: Mapping[str, Any], key: str) -> str | list[str] | None:
    value = document.get(key)
    is_names = isinstance(value, list) and len(value) <= MAX_NAMES and all(isinstance(name, str) for name in value)
    fits = value is None or isinstance(value, str) or is_names
    require(document, key, fits, f"up to {MAX_NAMES} names, a regular expression, or null")
    return value
