"""The command line as a process: pipes, signals, terminals, and handing over to the server."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.clients.protos import adapter, as_chat, event, job, last, piece, step_event, succeeded
from tests.clients.scripted_server import ScriptedServer, fail, hold

from graftwork.cli.loss_curve import LossCurve, sparkline
from graftwork.types import TuningEvent, TuningProgress
from graftwork.v1 import adapters_pb2 as a
from graftwork.v1 import tuning_pb2 as t

# python -m graftwork, with Ctrl-C working even if the tests run in a shell's background, whose children ignore it.
# (Not by preexec_fn: that forks this process, in which gRPC's threads run.)
MAIN = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("graftwork", run_name="__main__", alter_sys=True)
"""
CLI = [sys.executable, "-c", MAIN]


def start(server: ScriptedServer | None, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "GRAFTWORK_ADDRESS": server.address if server else "", **options.pop("env", {})}
    defaults: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*CLI, *arguments], env=environment, **{**defaults, **options})


def test_text_comes_before_the_end(server: ScriptedServer) -> None:
    gone = threading.Event()
    server.on("Generate", hold([piece("Once", 1)], gone))
    process = start(server, "generate", "base", "hi")
    assert process.stdout is not None
    assert process.stdout.read(4) == b"Once"
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=20)
    assert (rest, errors) == (b"\n", b"")
    assert process.returncode == 130
    assert gone.wait(10)


def test_leaving_a_job_says_that_it_goes_on(server: ScriptedServer) -> None:
    gone = threading.Event()
    server.on("GetTuningJob", t.GetTuningJobResponse(job=job()))
    server.on("WatchTuningJob", hold([step_event(1, 1)], gone))
    process = start(server, "tune", "watch", "j1")
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"step 1/3")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors == b"job j1 goes on; see: graftwork tune watch j1\n"
    assert process.returncode == 130
    assert gone.wait(10)
    assert server.requests("CancelTuningJob") == []


def test_a_closed_pipe_is_no_traceback(server: ScriptedServer) -> None:
    gone = threading.Event()
    server.on("Generate", hold([piece("x" * 100_000, 1), piece("y", 2)], gone))
    process = start(server, "generate", "base", "hi")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    assert gone.wait(10)


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


def test_a_terminal_is_not_steered_by_the_answer(server: ScriptedServer) -> None:
    server.on("Generate", [piece("a\x1b]0;owned\x07b\n", 1), last()])
    shown, code = on_terminal(server, "generate", "base", "hi")
    assert code == 0
    assert "\x1b]0;" not in shown
    assert "\ufffd]0;owned\ufffdb" in shown


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


@pytest.mark.parametrize(
    ("answer", "code", "sent"), [("y", 0, 1), ("YES", 0, 1), ("", 1, 0), ("no", 1, 0), (signal.SIGINT, 130, 0)]
)
def test_deleting_asks_on_a_terminal(
    server: ScriptedServer, answer: str | signal.Signals, code: int, sent: int
) -> None:
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter()))
    server.on("DeleteAdapter", a.DeleteAdapterResponse(deleted_versions=2))
    shown, ended = on_terminal(server, "adapter", "delete", "dates", turns=[answer], prompt=b"[y/N] ")
    assert "delete adapter dates with all its versions? [y/N] " in shown
    assert ended == code
    assert len(server.requests("DeleteAdapter")) == sent
    assert ("deleted dates (2 versions)" in shown) == bool(sent)


def test_deleting_with_yes_asks_nothing(server: ScriptedServer) -> None:
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter()))
    server.on("DeleteAdapter", a.DeleteAdapterResponse(deleted_versions=2))
    shown, code = on_terminal(server, "adapter", "delete", "dates", "--yes")
    assert (shown.strip(), code) == ("deleted dates (2 versions)", 0)


def test_a_terminal_gets_bars(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 2_000_000)
    server.on("CreateAdapter", a.CreateAdapterResponse(adapter=adapter()))
    server.on("GetTuningJob", t.GetTuningJobResponse(job=job()), t.GetTuningJobResponse(job=succeeded()))
    events = [step_event(1, 2), event(2, message="[bold]resumed[/bold]"), event(3, state=t.TUNING_JOB_STATE_SUCCEEDED)]
    server.on("WatchTuningJob", events)
    shown, code = on_terminal(server, "adapter", "create", "dates", str(tmp_path))
    assert code == 0
    assert "2.0" in shown
    assert "published dates@1" in shown
    shown, code = on_terminal(server, "tune", "watch", "j1")
    assert code == 0
    assert "2/3" in shown
    assert "loss 1.5000" in shown
    assert "[bold]resumed[/bold]" in shown


@pytest.fixture
def pretend_server(tmp_path: Path) -> dict[str, str]:
    """An environment in which graftwork_server is a module that shows how it was called."""
    code = "import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit(7)"
    (tmp_path / "graftwork_server.py").write_text(code)
    return {"PYTHONPATH": str(tmp_path)}


def test_serve_hands_over_everything(pretend_server: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    arguments = ["--model", "M x", "--listen=127.0.0.1:0", "--help", "extra", "-v", "--version", "--json"]
    process = start(None, "serve", *arguments, env=pretend_server)
    shown, errors = process.communicate(timeout=20)
    assert process.returncode == 7, errors
    pid, _, argv = shown.decode().strip().partition(" ")
    assert int(pid) == process.pid  # replaced, not started beside: signals reach it
    assert argv == repr(arguments)


def test_serve_without_the_server(tmp_path: Path) -> None:
    script = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "missing = sys.argv.pop(1)\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == missing else real(name, *rest)\n"
        "from graftwork.cli import main\n"
        "main()\n"
    )
    for missing in ("graftwork_server", "torch"):
        command = [sys.executable, "-c", script, missing, "serve", "--model", "x"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        assert 'pip install "graftwork[server]"' in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_terminal_keeps_the_loss_curve(server: ScriptedServer) -> None:
    def step(number: int) -> t.WatchTuningJobResponse:
        loss = 4.0 - number / 50
        progress = t.TuningProgress(step=number, total_steps=100, loss=loss, learning_rate=1e-4, eta_ms=1000)
        return event(number, progress=progress)

    server.on("GetTuningJob", t.GetTuningJobResponse(job=job()), t.GetTuningJobResponse(job=succeeded()))
    server.on(
        "WatchTuningJob", [*map(step, range(1, 101)), event(101, evaluation=t.TuningEvaluation(step=100, loss=2))]
    )
    shown, code = on_terminal(server, "tune", "watch", "j1")
    assert code == 0
    assert [int(step) for step in re.findall(r"step (\d+)(?:/100)?  ", shown)] == [*range(1, 101, 5), 100, 100]
    assert "loss           3.9800 █" in shown
    assert "▁ 2.0000  (steps 1 to 100)" in shown
    server.on("GetTuningJob", t.GetTuningJobResponse(job=job()), t.GetTuningJobResponse(job=succeeded()))
    plain, _ = start(server, "tune", "watch", "j1", env={"PYTHONIOENCODING": "utf-8"}).communicate(timeout=20)
    assert plain.count(b"\nstep ") == 100
    assert "█".encode() in plain


def test_a_long_curve_is_kept_in_little_memory() -> None:
    def steps(count: int) -> Iterator[TuningEvent]:
        for step in range(1, count + 1):
            progress = TuningProgress(step, count, 5.0 - 4 * step / count, 0.0, 0.0, 0, 0)
            yield TuningEvent(sequence=step, time=None, kind="progress", progress=progress)

    curve = LossCurve()
    assert sum(1 for _ in curve.watch(steps(60_000))) == 60_000
    assert len(curve._training) <= 5_001
    assert curve._training[-1] == (60_000, 1.0)
    drawn = sparkline([value for _, value in curve._training])
    assert len(drawn) == 50
    assert drawn == "".join(sorted(drawn, reverse=True))
    assert [drawn.count(block) for block in "▇▆▅▄▃▂"] == pytest.approx([7] * 6, abs=1)


def test_a_narrow_terminal_gets_long_values_below_each_other(server: ScriptedServer) -> None:
    spec = t.TuningJobSpec(strategy="lora", adapter_id="dates")
    spec.config.update({f"setting_{number}": number for number in range(30)})
    server.on("GetTuningJob", t.GetTuningJobResponse(job=t.TuningJob(job_id="j1", spec=spec)))
    shown, code = on_terminal(server, "tune", "show", "j1")
    assert code == 0
    lines = shown.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 120
    start = next(index for index, line in enumerate(lines) if line.startswith("settings "))
    assert lines[start + 1].startswith(" " * 10 + "setting_")
    plain, _ = start_and_read(server, "tune", "show", "j1")
    assert sum(line.startswith("settings ") and "setting_9=9" in line for line in plain.splitlines()) == 1


def start_and_read(server: ScriptedServer, *arguments: str) -> tuple[str, int]:
    process = start(server, *arguments)
    out, _ = process.communicate(timeout=20)
    return out.decode(), process.returncode
