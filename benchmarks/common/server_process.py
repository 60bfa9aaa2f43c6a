"""A real server for a benchmark: started on a free loopback port, ended at the end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from types import TracebackType


def end_on_sigterm() -> None:
    """A benchmark that is told to end leaves its with blocks, and so ends what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


class ServerProcess:
    """`graftwork serve` with `options`; `address` and `dtype` are those that it announced."""

    def __init__(self, options: list[str]) -> None:
        # The prompts of a benchmark come again and again: a cache would answer for the engine.
        self._command = [sys.executable, "-m", "graftwork_server", "--listen", "127.0.0.1:0", "--no-prefix-cache"]
        self._command += options
        self.address = ""
        self.dtype = ""

    def __enter__(self) -> ServerProcess:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        announced = re.search(r"parameters, (\w+) on \w+(?:, \w+)?\) on (\S+)", line)
        if announced is None:
            self._process.kill()
            raise RuntimeError(f"the server did not start: {line!r}")
        self.dtype, self.address = announced.groups()
        return self

    @property
    def process_id(self) -> int:
        """Of the front."""
        return self._process.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
