"""Values of keys in PEFT's adapter_config.json, read by their types.

All that read raise ArtifactError, which names the key and says what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graftwork_plugins import ArtifactError
from graftwork_plugins.peft_format.patterns import MAX_NAMES


def require(document: Mapping[str, Any], key: str, fits: bool, accepted: str) -> None:
    """Raises ArtifactError for `key` unless its value fits."""
    if not fits:
        raise ArtifactError(key, f"adapter_config.json: {key} is {shown(document.get(key))}; accepted: {accepted}")


def shown(value: Any) -> str:
    """A value as a message shows it, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_flag(document: Mapping[str, Any], key: str) -> bool:
    """true or false; false where the key is missing or null."""
    value = document.get(key)
    require(document, key, value is None or isinstance(value, bool), "true or false")
    return bool(value)


def read_number(document: Mapping[str, Any], key: str, default: int, *, integer: bool) -> float:
    """A number above 0; `default` where the key is missing."""
    return _number(key, document.get(key, default), integer)


def read_numbers(document: Mapping[str, Any], key: str, *, integers: bool) -> dict[str, float]:
    """Numbers above 0 by module name or pattern; none where the key is missing or empty."""
    value = document.get(key) or {}
    fits = isinstance(value, dict) and len(value) <= MAX_NAMES
    require(document, key, fits, f"an object of up to {MAX_NAMES} numbers by module name")
    return {name: _number(key, number, integers) for name, number in value.items()}


def read_names(document: Mapping[str, Any], key: str) -> str | list[str] | None:
    """A list of names, one regular expression, or None."""
    value = document.get(key)
    is_names = isinstance(value, list) and len(value) <= MAX_NAMES and all(isinstance(name, str) for name in value)
    fits = value is None or isinstance(value, str) or is_names
    require(document, key, fits, f"up to {MAX_NAMES} names, a regular expression, or null")
    return value


def read_list_of_names(document: Mapping[str, Any], key: str) -> list[str]:
    """A list of names; empty where the key is missing or null."""
    value = document.get(key) or []
    fits = isinstance(value, list) and len(value) <= MAX_NAMES and all(isinstance(n, str) and n for n in value)
    require(document, key, fits, f"a list of up to {MAX_NAMES} names, or null")
    return list(value)


def _number(key: str, value: Any, integer: bool) -> float:
    kinds = int if integer else int | float
    fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and 0 < value <= 65_536
    if not fits:
        accepted = "a whole number" if integer else "a number"
        raise ArtifactError(key, f"adapter_config.json: {key} has {shown(value)}; accepted: {accepted} up to 65536")
    return float(value)
