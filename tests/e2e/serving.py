"""`graftwork serve` as a process of its own, as a user starts it, and a look at the processes behind it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from graftwork import Client

START_SECONDS = 240.0
"""Generous: a server imports torch and transformers, and the machine may be busy with something else."""

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str, seconds: float = START_SECONDS) -> T:
    """The first true result of `look`, asked for again and again. Fails the test, naming `what`, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (result := look()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.05)
    return result


def environment(**more: str) -> dict[str, str]:
    """This process's environment without settings of Graftwork's but `more`; the kind of processor stays (kinds.py)."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("GRAFTWORK_") or key == "GRAFTWORK_KERNELS_MARCH"
    }
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def serve_command(*flags: str) -> list[str]:
    """The command line of a server on a free loopback port, unless the flags say otherwise."""
    return [sys.executable, "-m", "graftwork_server", "--listen", "127.0.0.1:0", *flags]


def run_cli(*arguments: str, address: str = "", seconds: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
    """Runs `graftwork ...` against a server and returns how it ended."""
    more = {"GRAFTWORK_ADDRESS": address} if address else {}
    command = [sys.executable, "-m", "graftwork", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment(**more))


class Server:
    """A running server. Its log is `log`, beside the data directory."""

    def __init__(self, model: Path, data_dir: Path, *flags: str, **variables: str) -> None:
        self.data_dir = data_dir
        self.log = data_dir.with_name(f"{data_dir.name}.log")
        command = serve_command(
            "--model", str(model), "--data-dir", str(data_dir), "--threads", "1", "--dtype", "float32", *flags
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                text=True,
                env=environment(**variables),
            )
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        if " on 127.0.0.1:" not in self.greeting:
            self.close()
            raise AssertionError(f"the server did not start: {self.last_words()}")
        self.address = self.greeting.split()[-1]

    def client(self, **options: Any) -> Client:
        """A client that does not give up before a slow machine does. Retries nothing unless told to."""
        return Client(address=self.address, **{"timeout": START_SECONDS, "max_retries": 0, **options})

    def artifact(self, digest: str) -> Path:
        """The folder of a version's files."""
        return self.data_dir / "artifacts" / digest.removeprefix("sha256:")

    def engine(self) -> psutil.Process | None:
        """The engine process, None if there is none now."""
        return _child(self.process.pid, "graftwork_server.engine_main")

    def tuner(self) -> psutil.Process | None:
        """The tuner process, None if there is none now."""
        engine = self.engine()
        return engine and _child(engine.pid, "graftwork_server.tuner_main")

    def descendants(self) -> list[psutil.Process]:
        """Every process that this server has started and that still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def last_words(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-3000:]

    def close(self) -> None:
        """Ends the server as an impatient operator does, and what it has started with it."""
        started = self.descendants()
        for process in [self.process, *started]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        psutil.wait_procs(started, timeout=30)
        self.process.communicate()


def _child(pid: int, module: str) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if module in child.cmdline():
                    return child
    return None
