"""PEFT's rules for which modules of the base a name means, and what to say of a name that means none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from graftwork_plugins import ArtifactError, BaseInfo, ConfigError


def modules_named(names: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Those of `modules` that are named in full or by their last dotted parts."""
    wanted = set(names)
    return [module for module in modules if any(ending in wanted for ending in _endings(module))]


def _endings(module: str) -> Iterable[str]:
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def is_within(module: str, name: str) -> bool:
    """Whether `module` is meant by `name` in modules_to_save, or is part of one that is.

    PEFT compares the ends of names as text: "norm" means "input_layernorm" too."""
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts) + 1))


def linear_layer_endings(base: BaseInfo) -> str:
    """The last parts of the names of the base's linear layers, for messages."""
    return ", ".join(sorted({module.rpartition(".")[2] for module in base.linear_modules}))


def no_linear_layer(field: str, name: str, base: BaseInfo) -> ConfigError:
    """The error for a setting with a name or pattern that matches no linear layer of the base."""
    return ConfigError(
        field,
        f"{field}: {name!r} matches no linear layer of the base; its linear layers end in {linear_layer_endings(base)}",
    )


def no_such_module(tensor: str, module: str, known: Mapping[str, object]) -> ArtifactError:
    """The error for a tensor, by its full name, of a module that is not among those that are known."""
    close = difflib.get_close_matches(module, known, 1)
    hint = f"; the closest is {close[0]}" if close else ""
    return ArtifactError(tensor, f"tensor {tensor} is for the module {module}, which the base has not{hint}")
