"""Messages made of a caller's arguments: what does not fit is an error that names the argument and what is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

_ERRORS = (TypeError, ValueError, OverflowError)
_SHOWN = 60
"""Characters of a value that an error has."""
_ACCEPTED = {
    FieldDescriptor.CPPTYPE_INT32: f"an integer up to {2**31 - 1}",
    FieldDescriptor.CPPTYPE_INT64: f"an integer up to {2**63 - 1}",
    FieldDescriptor.CPPTYPE_UINT32: f"an integer from 0 to {2**32 - 1}",
    FieldDescriptor.CPPTYPE_UINT64: f"an integer from 0 to {2**64 - 1}",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
    FieldDescriptor.CPPTYPE_STRING: "valid Unicode text",
}


def build(kind: type[M], names: Mapping[str, str] | None = None, /, **fields: Any) -> M:
    """kind(**fields); None leaves a field unset. names: what a caller calls a field, where it is not its own name.

    Raises TypeError or ValueError for a value that its field cannot hold; a text is no list of texts.
    """
    for name, value in fields.items():
        if isinstance(value, str) and kind.DESCRIPTOR.fields_by_name[name].is_repeated:
            raise _unfit(kind, name, value, names, TypeError())
    try:
        return kind(**fields)
    except _ERRORS:
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except _ERRORS as error:
                raise _unfit(kind, name, value, names, error) from None
        raise


def text(value: Any, called: str) -> str:
    """`value`, if it is valid Unicode text. Raises TypeError or ValueError naming what it is called."""
    if not isinstance(value, str):
        raise TypeError(f"{called} is {value!r:.60}; {_ACCEPTED[FieldDescriptor.CPPTYPE_STRING]} is accepted")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{called} is {value!r:.60}; {_ACCEPTED[FieldDescriptor.CPPTYPE_STRING]} is accepted"
        ) from None
    return value


def _unfit(
    kind: type[Message], name: str, value: Any, names: Mapping[str, str] | None, error: Exception
) -> TypeError | ValueError:
    """The error for a value that field `name` of `kind` does not take; of a list it names the first wrong item."""
    field = kind.DESCRIPTOR.fields_by_name[name]
    called = (names or {}).get(name, name)
    accepted = _ACCEPTED.get(field.cpp_type, f"a {field.message_type.name}" if field.message_type else "another value")
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        of = field.message_type.fields_by_name
        accepted = f"a mapping of {_ACCEPTED[of['key'].cpp_type]} to {_ACCEPTED[of['value'].cpp_type]}"
    elif field.is_repeated:
        wrong = _first_wrong(kind, name, value)
        if wrong is None:
            accepted = f"a list, each item {accepted},"
        else:
            called, value = f"{called}[{wrong}]", value[wrong]
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
    made = TypeError if isinstance(error, TypeError) else ValueError
    return made(f"{called} is {shown}; {accepted} is accepted")


def _first_wrong(kind: type[Message], name: str, values: Any) -> int | None:
    if not isinstance(values, list | tuple):
        return None
    for index, value in enumerate(values):
        try:
            kind(**{name: [value]})
        except _ERRORS:
            return index
    return None
