"""Modules that an adapter has whole: what adapter_config.json lists as modules_to_save."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from graftwork_plugins import ArtifactError, BaseInfo, Replace
from graftwork_plugins.peft_format.adapter_config import AdapterConfig
from graftwork_plugins.peft_format.files import PREFIX, WEIGHTS_FILE
from graftwork_plugins.peft_format.module_names import is_within

if TYPE_CHECKING:
    import torch


def replacements(
    replaced: Mapping[str, Mapping[str, torch.Tensor]], config: AdapterConfig, base: BaseInfo
) -> list[Replace]:
    """Modules that the adapter has whole. Each name in modules_to_save must have its tensors."""
    modules = _modules(base)
    for name in config.modules_to_save:
        meant = {module for module in modules if is_within(module, name)}
        if not meant:
            close = difflib.get_close_matches(name, {module.rpartition(".")[2] for module in modules}, 1)
            hint = f"; the closest is {close[0]}" if close else ""
            raise ArtifactError(
                "modules_to_save",
                f"modules_to_save names {name}, which the base has not{hint}; linear layers, embeddings and norms of "
                "the base are accepted",
            )
        wanted = [(module, leaf) for module in sorted(meant) for leaf in modules[module]]
        if missing := [f"{module}.{leaf}" for module, leaf in wanted if leaf not in replaced.get(module, {})]:
            raise ArtifactError(
                "modules_to_save",
                f"modules_to_save names {name}, but {WEIGHTS_FILE} has no {PREFIX}{missing[0]}",
            )
    result = {module: dict(tensors) for module, tensors in replaced.items()}
    if config.ties_saved_modules() and base.input_module in result:
        for tied in base.tied_modules:
            result.setdefault(tied, {}).setdefault("weight", result[base.input_module]["weight"])
    return [Replace(module=module, tensors=tensors) for module, tensors in sorted(result.items())]


def _modules(base: BaseInfo) -> dict[str, list[str]]:
    """The base's modules that have parameters of their own, with the names of these."""
    modules: dict[str, list[str]] = {}
    for name in base.parameters:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    return modules
