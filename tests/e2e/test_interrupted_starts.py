"""A server or a command that is told to end, or killed, while it starts: no traceback, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.e2e.serving import START_SECONDS, environment, eventually, serve_command

# As in a terminal, and a signal that comes exactly when a module is imported. (Sent by time, it would come while Python
# itself starts, on a busy machine, and no program can do anything about that.)
AT_IMPORT = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
package, number, module = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.argv[1:4] = []
def look(event, arguments):
    if event == "import" and arguments[0] == module:
        os.kill(os.getpid(), number)
sys.addaudithook(look)
runpy.run_module(package, run_name="__main__", alter_sys=True)
"""


def ended(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=START_SECONDS, env=ours(folder)
    )


def ours(folder: Path) -> dict[str, str]:
    (folder / "tmp").mkdir(exist_ok=True)
    return environment(TMPDIR=str(folder / "tmp"))


@pytest.mark.parametrize(
    "module",
    ["importlib.metadata", "asyncio", "sqlalchemy", "grpc", "graftwork_server.front.front", "graftwork_server.config"],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_told_to_end_while_it_imports(module: str, number: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_IMPORT, "graftwork_server", str(int(number)), module]
    done = ended([*command, "--data-dir", str(tmp_path / "data")], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "module", ["typing", "importlib.metadata", "typer", "grpc", "graftwork.client", "graftwork.cli.commands.adapter"]
)
def test_a_command_interrupted_while_it_imports(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_IMPORT, "graftwork", str(int(signal.SIGINT)), module, "adapter", "list"]
    done = ended(command, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_during_the_hand_over_waits_for_the_server(number: int, code: int, tmp_path: Path) -> None:
    source = AT_IMPORT.replace('event == "import" and arguments[0] == module', 'event == "os.exec"')
    command = [sys.executable, "-c", source, "graftwork", str(int(number)), "-", "serve"]
    done = ended([*command, "--data-dir", str(tmp_path / "data")], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def engine_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    found = psutil.Process(process.pid).children()
    return next((child for child in found if "graftwork_server.engine_main" in child.cmdline()), None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_a_server_that_ends_while_its_engine_starts(model_dir: Path, tmp_path: Path, number: int, code: int) -> None:
    command = serve_command("--model", str(model_dir), "--data-dir", str(tmp_path / "data"))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=ours(tmp_path)
    ) as process:
        engine = eventually(lambda: engine_of(process), "the engine")
        process.send_signal(number)
        out, err = process.communicate(timeout=START_SECONDS)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    _, alive = psutil.wait_procs([engine], timeout=START_SECONDS)
    assert not alive
    assert os.listdir(tmp_path / "tmp") == []
