"""The messages and tools of a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from graftwork import types
from graftwork.requests.fields import build
from graftwork.v1 import generation_pb2 as pb

Messages: TypeAlias = Sequence[types.Message | Mapping[str, Any]]
Tools: TypeAlias = Sequence[Mapping[str, Any]]


def chat_messages(messages: Messages) -> list[pb.ChatMessage]:
    """A conversation as it is sent. Raises TypeError or ValueError naming the message and the field that is wrong."""
    given = () if isinstance(messages, str | Mapping) else tuple(messages)
    if isinstance(messages, str | Mapping) or not all(isinstance(message, Mapping) for message in given):
        raise TypeError('messages is a list of messages, such as [{"role": "user", "content": "Hello"}]')
    return [_message(message, f"messages[{index}]") for index, message in enumerate(given)]


def _message(message: Mapping[str, Any] | types.Message, called: str) -> pb.ChatMessage:
    if "role" not in message:
        raise ValueError(f'{called} has no "role"; it is "system", "user", "assistant" or another of the template\'s')
    fields = ("role", "content", "tool_call_id", "name")
    known = (*fields, "tool_calls")
    for name, value in message.items():
        if value and name not in known:
            raise ValueError(f"{called} has {name!r}; a message has {', '.join(known)}")
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(f'{called} has no "content"; give the text, which may be ""')
    values = {name: message.get(name) or "" for name in fields}
    if not isinstance(values["content"], str):
        values["content"] = _joined(values["content"], f"{called}.content")
    return build(
        pb.ChatMessage,
        {name: f"{called}.{name}" for name in fields},
        **values,
        tool_calls_json=json_text(message.get("tool_calls")),
    )


def _joined(parts: Any, called: str) -> str:
    """The text of content that is a list of text parts, as other APIs have it; nothing is put between them."""
    if not isinstance(parts, list | tuple):
        raise TypeError(f'{called} is {parts!r:.60}; a text is accepted, or a list of {{"type": "text", "text": ...}}')
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise TypeError(f'{called}[{index}] is {part!r:.60}; {{"type": "text", "text": ...}} is accepted')
    return "".join(part["text"] for part in parts)


def json_text(value: Any) -> str:
    """Tools, or the calls of tools, as JSON; "" for none. Raises ValueError for what JSON cannot hold."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) if value else ""
