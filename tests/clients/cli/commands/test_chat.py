"""graftwork chat: one message per line of stdin; and on a terminal."""

from __future__ import annotations

import json
import signal
from typing import Any

import grpc
from tests.clients.cli.running import objects, on_terminal
from tests.clients.protos import as_chat, last
from tests.clients.scripted_server import ScriptedServer, fail


def test_chat_reads_a_message_per_line(server: ScriptedServer, run: Any) -> None:
    server.on("Chat", [as_chat(last("one"))], [as_chat(last("two"))], [as_chat(last("three"))])
    result = run("chat", "base", "--system", "Be brief.", stdin="Hi\n\nAnd?\n/reset\nNew\n/exit\nnever\n")
    assert result.stdout == "one\ntwo\nthree\n"
    said = [[(m.role, m.content) for m in request.messages] for request in server.requests("Chat")]
    system = ("system", "Be brief.")
    assert said == [
        [system, ("user", "Hi")],
        [system, ("user", "Hi"), ("assistant", "one"), ("user", "And?")],
        [system, ("user", "New")],
    ]


def test_chat_json_and_failure(server: ScriptedServer, run: Any) -> None:
    server.on("Chat", [as_chat(last("one"))], fail(grpc.StatusCode.INVALID_ARGUMENT, "too long"))
    result = run("chat", "base", "--json", stdin="Hi\nAnd?\nNever\n", code=1)
    assert [answer["text"] for answer in objects(result)] == ["one"]
    assert json.loads(result.stderr)["error"]["message"] == "too long"
    assert len(server.seen) == 2


def test_a_conversation_that_is_full_says_how_to_go_on_and_ctrl_c_ends_the_line(server: ScriptedServer) -> None:
    full = fail(grpc.StatusCode.INVALID_ARGUMENT, "the input has 600 tokens", reason="PROMPT_TOO_LONG")
    server.on("Chat", full, [as_chat(last("one"))], full)
    shown, code = on_terminal(server, "chat", "base", turns=["Long", "Hi", "More", signal.SIGINT])
    lines = [line for line in shown.replace("\r", "").split("\n") if "error:" in line or "/reset" in line]
    assert lines.pop(0) == "(/reset forgets the conversation, /exit or Ctrl-D ends it)"
    assert len(lines) == 3
    assert "/reset" not in lines[0]  # a message that is too long by itself is so after /reset, too
    assert lines[2] == "(the conversation has become too long; /reset begins a new one)"
    assert shown.endswith("\n")
    assert code == 130
