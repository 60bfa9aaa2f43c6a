"""The command line as a process, with pipes or on a terminal; and what it printed as JSON."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.clients.scripted_server import ScriptedServer
from typer.testing import Result

# python -m graftwork, with Ctrl-C working even if the tests run in a shell's background, whose children ignore it.
# (Not by preexec_fn: that forks this process, in which gRPC's threads run.)
MAIN = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("graftwork", run_name="__main__", alter_sys=True)
"""

CLI = [sys.executable, "-c", MAIN]


def objects(result: Result) -> list[Any]:
    """What a command printed with --json, a value for each line."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def start(server: ScriptedServer | None, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "GRAFTWORK_ADDRESS": server.address if server else "", **options.pop("env", {})}
    defaults: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*CLI, *arguments], env=environment, **{**defaults, **options})


def on_terminal(
    server: ScriptedServer, *arguments: str, turns: Sequence[str | signal.Signals] = (), prompt: bytes = b"> "
) -> tuple[str, int]:
    """What a command shows on a terminal, and its exit code. turns: what is typed or sent, one at each prompt."""
    waiting = list(turns)
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "120"}
    process = start(server, *arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
            if waiting and shown.count(prompt) > len(turns) - len(waiting):
                turn = waiting.pop(0)
                if isinstance(turn, signal.Signals):
                    process.send_signal(turn)
                # After a signal as well: readline waits for a key if the signal came just before it began to wait.
                os.write(ours, (turn if isinstance(turn, str) else "").encode() + b"\n")
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    return shown.decode(), process.wait(20)


def start_and_read(server: ScriptedServer, *arguments: str) -> tuple[str, int]:
    process = start(server, *arguments)
    out, _ = process.communicate(timeout=20)
    return out.decode(), process.returncode
