"""graftwork serve: handing over to the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.clients.cli.running import start


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
