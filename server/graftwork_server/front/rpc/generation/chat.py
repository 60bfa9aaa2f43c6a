"""Conversations as requests have them, checked and turned into what chat templates read."""

from __future__ import annotations

from typing import Any

from graftwork.v1 import generation_pb2 as pb
from graftwork_plugins import read_json
from graftwork_server.errors import InvalidArgument, Violation
from graftwork_server.front.rpc.limits import check_messages, invalid
from graftwork_server.text import TextProcessor
from graftwork_server.text.strangers.isolated_text import IsolatedTexts

MAX_JSON_BYTES = 256 << 10
MAX_TOOLS = 128


async def chat_ids(
    request: pb.ChatRequest | pb.TokenizeRequest, text: TextProcessor, texts: IsolatedTexts
) -> list[int]:
    """Token ids of the request's conversation, up to where the model is to write.

    Raises InvalidArgument naming what is wrong, and the errors of TextProcessor.encode_chat and IsolatedTexts.run.
    """
    check_messages(request.messages)
    turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(request.messages)]
    tools = json_objects(request.tools_json, "tools_json")
    if tools is not None and len(tools) > MAX_TOOLS:
        raise invalid([Violation("tools_json", f"has {len(tools)} tools; at most {MAX_TOOLS} are accepted")])
    if request.continue_final_message and request.messages[-1].role != "assistant":
        what = "needs a last message of the assistant, to be continued; leave it out to begin a new one"
        raise invalid([Violation("continue_final_message", what)])
    size = sum(len(message.content) + len(message.tool_calls_json) for message in request.messages)
    return await texts.run(
        text,
        size + len(request.tools_json),
        lambda text: text.encode_chat(turns, tools=tools, continue_final_message=request.continue_final_message),
        "messages",
    )


def json_objects(text: str, field: str) -> list[dict[str, Any]] | None:
    """The JSON list of objects in `text`, None for none. Raises InvalidArgument naming `field`."""
    if not text:
        return None
    if len(text.encode()) > MAX_JSON_BYTES:
        raise invalid([Violation(field, f"has {len(text.encode())} bytes; at most {MAX_JSON_BYTES} are accepted")])
    try:
        value = read_json(text)
    except ValueError as error:
        raise InvalidArgument(f"{field} is no JSON: {error}", reason="INVALID_PARAMETER", field=field) from None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise invalid([Violation(field, "is no list of objects; a JSON list of objects is accepted")])
    return value


def _turn(message: pb.ChatMessage, where: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    calls = json_objects(message.tool_calls_json, f"{where}.tool_calls_json")
    others = {"tool_calls": calls, "tool_call_id": message.tool_call_id, "name": message.name}
    return turn | {key: value for key, value in others.items() if value}
