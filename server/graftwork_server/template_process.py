"""Chat templates of strangers: rendered in a process of its own, with limits on time, memory and size.

Jinja's sandbox keeps a template from the server's objects, but a few lines of it can still loop for ever or fill the
memory. So a template that came with an upload never runs in the front.

    python -m graftwork_server.template_process     reads one JSON request a line, answers one JSON line each
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from graftwork_server.chat_template import ChatTemplate, Message, Span
from graftwork_server.errors import FailedPrecondition, GraftworkServerError, InvalidArgument

SECONDS = 5.0
"""Longest rendering, starting the process included."""
MEMORY_BYTES = 512 << 20
MAX_CHARACTERS = 4 << 20
MAX_TEMPLATE_CHARACTERS = 256 << 10


class TemplateProcess:
    """One process that renders; started when it is first needed and again after it had to be killed. Thread-safe."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self, source: str, variables: Mapping[str, str]) -> IsolatedTemplate:
        """A template that renders there. Raises FailedPrecondition (CHAT_TEMPLATE_BROKEN) if it is none."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise FailedPrecondition(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARACTERS} are accepted",
                reason="CHAT_TEMPLATE_BROKEN",
            )
        return IsolatedTemplate(self, source, variables)

    def ask(self, **request: Any) -> str:
        """The text that the process answers with. Raises its error, or InvalidArgument (CHAT_TEMPLATE_REJECTED)."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            answer = self._exchange(line)
            if answer is None:
                self.close()
                raise InvalidArgument(
                    f"the adapter's chat template took more than {self._seconds:g} s or too much memory",
                    reason="CHAT_TEMPLATE_REJECTED",
                    field="messages",
                )
        if "error" in answer:
            raise _error(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _exchange(self, line: bytes) -> dict[str, Any] | None:
        """The answer to a request; None if none came in time or the process died."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-m", "graftwork_server.template_process"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + self._seconds
        writer = threading.Thread(target=_write, args=(process.stdin, line), daemon=True)
        writer.start()  # it reads all of a request before it answers, but a dead one reads nothing
        received = bytearray()
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece or len(received) > 8 * MAX_CHARACTERS:
                return None
            received += piece
        answer: dict[str, Any] = json.loads(received)
        return answer


class IsolatedTemplate:
    """A chat template that renders in a TemplateProcess; the methods are ChatTemplate's."""

    marks_generation = False

    def __init__(self, process: TemplateProcess, source: str, variables: Mapping[str, str]) -> None:
        self._process = process
        self._fixed = {"source": source, "variables": dict(variables)}
        process.ask(method="compile", messages=[], extra={}, **self._fixed)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **variables: Any) -> str:
        """See ChatTemplate."""
        extra = {"add_generation_prompt": add_generation_prompt, **variables}
        return self._process.ask(method="render", messages=list(messages), extra=extra, **self._fixed)

    def render_unfinished(self, messages: Sequence[Message], **variables: Any) -> str:
        """See ChatTemplate."""
        return self._process.ask(method="render_unfinished", messages=list(messages), extra=variables, **self._fixed)

    def render_with_spans(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[Span]]:
        """Not for templates of adapters: they serve, and data sets are rendered with the base's."""
        raise NotImplementedError


def _error(body: Mapping[str, str]) -> GraftworkServerError:
    known = InvalidArgument if body["code"] == "INVALID_ARGUMENT" else FailedPrecondition
    return known(body["message"], reason=body["reason"], field=body["field"])


def _write(pipe: Any, line: bytes) -> None:
    try:
        pipe.write(line)
    except (OSError, ValueError):
        return


@lru_cache(8)
def _compiled(source: str, variables: str) -> ChatTemplate:
    return ChatTemplate(source, json.loads(variables))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        template = _compiled(request["source"], json.dumps(request["variables"]))
        if request["method"] == "compile":
            return {"text": ""}
        text = getattr(template, request["method"])(request["messages"], **request["extra"])
        if len(text) > MAX_CHARACTERS:
            raise InvalidArgument(
                f"the chat template makes {len(text)} characters of this; at most {MAX_CHARACTERS} are accepted",
                reason="CHAT_TEMPLATE_REJECTED",
                field="messages",
            )
        return {"text": text}
    except GraftworkServerError as error:
        field = error.violations[0].field if error.violations else ""
        return {"error": {"code": error.code, "reason": error.reason, "message": error.message[:2000], "field": field}}


def main() -> None:
    """Answers requests until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(_answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
