"""Messages of a conversation: what is sent, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tests.clients.protos import as_chat, last
from tests.clients.scripted_server import ScriptedServer

import graftwork


def test_chat_sends_the_conversation(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Chat", [as_chat(last("Hello"))])
    conversation = [graftwork.Message(role="system", content="Be brief."), {"role": "user", "content": "Hi"}]
    assert client.chat("base", conversation, max_tokens=5).text == "Hello"
    request = server.requests("Chat")[0]
    assert [(m.role, m.content) for m in request.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert request.sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "user", "contents": "hi"}, r"messages\[0\] has 'contents'; a message has role, content"),
        ({"role": "user"}, r'messages\[0\] has no "content"'),
        ({"content": "hi"}, r'messages\[0\] has no "role"'),
    ],
)
def test_a_message_that_says_nothing_is_refused(client: graftwork.Client, message: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        client.chat("base", [message])


def test_a_message_of_calls_needs_no_content(server: ScriptedServer, client: graftwork.Client) -> None:
    """As other APIs write them, with what is null or empty left in."""
    server.on("Chat", [as_chat(last("c", 2))])
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    client.chat("base", [{"role": "assistant", "tool_calls": calls, "refusal": None, "annotations": []}])


def test_content_is_a_list_of_text_parts(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Chat", [as_chat(last("c", 2))])
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    client.chat("base", [{"role": "user", "content": parts}])
    assert server.requests("Chat")[0].messages[0].content == "Hello"
