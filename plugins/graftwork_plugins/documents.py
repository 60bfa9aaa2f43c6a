"""JSON of strangers. What is read here can be written, logged and sent again."""

from __future__ import annotations

import json
from typing import Any, NoReturn

_MAX_DEPTH = 200
"""Deeper ones exhaust the stack of who walks them next."""
_MAX_BITS = 1023
"""Of whole numbers: larger ones fit no float, and Python raises OverflowError wherever they are computed with."""


def read_json(text: str | bytes, *, constants: bool = False) -> Any:
    """The value that `text` holds, as UTF-8.

    Raises ValueError where it holds none, and for what Python's reader lets pass: half surrogates, which are no text,
    values nested more than 200 deep, whole numbers that no float can hold, and, without `constants`, NaN and Infinity,
    which are no JSON.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, parse_constant=None if constants else _refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check(value)
    return value


def _check(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str) and not item.isascii():
                _check_text(item)
            elif isinstance(item, int) and item.bit_length() > _MAX_BITS:
                raise ValueError("a whole number in it has over 300 digits")
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!r} in it is half of a surrogate pair, which is no character") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
