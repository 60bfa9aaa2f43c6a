"""From the fields of a message to those of a value: what several kinds of answer have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

from google.protobuf import json_format, struct_pb2, timestamp_pb2

T = TypeVar("T")


def from_message(cls: Callable[..., T], message: Any, **changed: Any) -> T:
    """A dataclass of a message whose fields have the same names. changed: those that are not taken over as they are."""
    return cls(**{name: getattr(message, name) for name in _names(cls) - changed.keys()}, **changed)


@cache
def _names(cls: Any) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(cls))


def optional(message: Any, field: str) -> Any:
    """A field's value; None where the message does not say."""
    return getattr(message, field) if message.HasField(field) else None


def time(message: Any, field: str) -> datetime | None:
    """A timestamp field in UTC; None where the message does not say."""
    stamp: timestamp_pb2.Timestamp | None = optional(message, field)
    return None if stamp is None else stamp.ToDatetime(tzinfo=UTC)


def json_value(message: struct_pb2.Struct | struct_pb2.Value) -> Any:
    """A Struct as a dict, a Value as what it holds; whole numbers as int."""
    return _whole(json_format.MessageToDict(message))


def _whole(value: Any) -> Any:
    """Whole numbers as int: a Struct knows doubles only, and "rank": 8.0 is not what was asked for."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
