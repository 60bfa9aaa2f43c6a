"""LoRA artifacts as deltas, whatever their task: text, classifiers (SEQ_CLS) or embeddings (FEATURE_EXTRACTION).

PEFT wraps another class of transformers' for each task, and names the same modules as that class does:

    CAUSAL_LM            LlamaForCausalLM                   model.layers.0...
    SEQ_CLS              LlamaForSequenceClassification     model.layers.0..., score
                         BertForSequenceClassification      bert.encoder.layer.0..., classifier
    FEATURE_EXTRACTION   LlamaModel, BertModel              layers.0..., encoder.layer.0...

So the base is first renamed to what the adapter calls it; everything else reads it as it does for CAUSAL_LM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from graftwork_plugins import (
    Artifact,
    ArtifactError,
    BaseInfo,
    Delta,
    FullWeights,
    Head,
    HeadLayout,
    Prefix,
    head_of,
    layout_of,
)
from graftwork_plugins.peft_format.adapter_config import LABEL_KEYS, LoraAdapterConfig
from graftwork_plugins.peft_format.files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, check_values, read_tensors
from graftwork_plugins.peft_format.lora_tensors import lora_deltas
from graftwork_plugins.peft_format.module_names import is_within

if TYPE_CHECKING:
    import torch

_MODEL_CONFIG = "config.json"
_ALWAYS_SAVED = ("classifier", "score")
"""What PEFT puts into modules_to_save of every SEQ_CLS adapter, whatever its model has."""

T = TypeVar("T")


def task_deltas(artifact: Artifact, config: LoraAdapterConfig, base: BaseInfo) -> list[Delta]:
    """The deltas of the artifact for the base as it is hosted. Raises ArtifactError, PatternError."""
    tensors = read_tensors(artifact)
    is_encoder = bool(base.trunk_name) and not base.trunk
    if is_encoder and config.task_type == "CAUSAL_LM":
        raise ArtifactError(
            "task_type",
            f"{CONFIG_FILE}: task_type is CAUSAL_LM, and the base is an encoder; SEQ_CLS, FEATURE_EXTRACTION and null "
            "are accepted",
        )
    if not is_encoder and config.task_type in (None, "CAUSAL_LM"):
        return lora_deltas(tensors, config, base)
    seen, hosted = _as_named_by(config, tensors, base)
    heads: list[Delta] = []
    if config.task_type == "SEQ_CLS":
        layout = layout_of(base.config)
        heads = [_head(artifact, _take_head(tensors, layout), layout, base)]
        config = dataclasses.replace(config, modules_to_save=_of_trunk(config, layout, seen))
    deltas = lora_deltas(tensors, config, seen)
    return [*(_renamed(delta, hosted) for delta in deltas), *heads]


def _as_named_by(
    config: LoraAdapterConfig, tensors: Mapping[str, torch.Tensor], base: BaseInfo
) -> tuple[BaseInfo, Mapping[str, str]]:
    """The base with the adapter's names, and from each of these the base's own."""
    rename = _renaming(config, tensors, base)

    def renamed(of: Mapping[str, T]) -> dict[str, T]:
        return {new: value for name, value in of.items() if (new := rename(name)) is not None}

    owners = {name.rpartition(".")[0] for name in base.parameters}
    modules = {*base.linear_modules, *base.embedding_modules, *owners} - {""}
    seen = dataclasses.replace(
        base,
        linear_modules=renamed(base.linear_modules),
        embedding_modules=renamed(base.embedding_modules),
        parameters=renamed(base.parameters),
        tied_modules=list(renamed(dict.fromkeys(base.tied_modules))),
        input_module=rename(base.input_module) if base.input_module else None,
        output_module=None,
    )
    return seen, {new: name for name in modules if (new := rename(name)) is not None}


def _renaming(
    config: LoraAdapterConfig, tensors: Mapping[str, torch.Tensor], base: BaseInfo
) -> Callable[[str], str | None]:
    """From the base's names to the adapter's; None for what the adapter's class of model does not have."""
    if not base.trunk:
        before = f"{base.trunk_name}."
        if not base.trunk_name or not any(name.startswith(PREFIX + before) for name in tensors):
            return lambda name: name
        unused = layout_of(base.config).unused
        return lambda name: None if unused and _is_part(name, unused) else before + name
    if config.task_type == "FEATURE_EXTRACTION":
        trunk = f"{base.trunk}."
        return lambda name: name.removeprefix(trunk) if name.startswith(trunk) else None
    return lambda name: None if base.output_module and _is_part(name, base.output_module) else name


def _is_part(name: str, module: str) -> bool:
    """Whether `name` is the module or something in it."""
    return name == module or name.startswith(f"{module}.")


def _renamed(delta: Delta, hosted: Mapping[str, str]) -> Delta:
    if isinstance(delta, Prefix | Head | FullWeights):
        return delta
    return dataclasses.replace(delta, module=hosted[delta.module])


# ---------------------------------------------------------------------------------------------- the head


def _take_head(tensors: dict[str, torch.Tensor], layout: HeadLayout) -> dict[str, torch.Tensor]:
    """Takes the head's own tensors out of `tensors`."""
    taken = {}
    for full_name in list(tensors):
        name = full_name.removeprefix(PREFIX)
        module, _, leaf = name.rpartition(".")
        if module in layout.modules and leaf in ("weight", "bias"):
            check_values(full_name, tensors[full_name])
            taken[name] = tensors.pop(full_name)
    return taken


def _head(artifact: Artifact, tensors: Mapping[str, torch.Tensor], layout: HeadLayout, base: BaseInfo) -> Head:
    document: dict[str, Any] = {key: artifact.json(CONFIG_FILE).get(key) for key in LABEL_KEYS}
    document["pad_token_id"] = base.config.get("pad_token_id")
    file = CONFIG_FILE
    if _MODEL_CONFIG in artifact.names():
        given = {key: artifact.json(_MODEL_CONFIG).get(key) for key in (*LABEL_KEYS, "pad_token_id")}
        document |= {key: value for key, value in given.items() if value is not None}
        file = _MODEL_CONFIG if any(given[key] is not None for key in LABEL_KEYS) else CONFIG_FILE
    try:
        return head_of(tensors, layout, document, file)
    except ArtifactError as error:
        if error.key in document or not layout.outputs:
            raise
        raise ArtifactError(
            f"{PREFIX}{error.key}",
            f"task_type is SEQ_CLS, and {WEIGHTS_FILE} has no {PREFIX}{error.key}; accepted are heads that are saved "
            f"whole (modules_to_save): {', '.join(layout.modules)}",
        ) from None


def _of_trunk(config: LoraAdapterConfig, layout: HeadLayout, base: BaseInfo) -> list[str]:
    """modules_to_save without the names that mean nothing but the head."""
    owners = {name.rpartition(".")[0] for name in base.parameters}

    def is_heads(name: str) -> bool:
        meant = name in _ALWAYS_SAVED or any(is_within(module, name) for module in layout.modules)
        return meant and not any(is_within(owner, name) for owner in owners)

    return [name for name in config.modules_to_save if not is_heads(name)]
