"""A real server process for the demo: started, read for its address, and always ended."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_STOP_SECONDS = 30


class DemoError(Exception):
    """What went wrong, in a sentence for the person who watches."""


class DemoServer:
    """`graftwork serve` on a free port, for a with block; its log goes to a file. Raises DemoError if it ends badly."""

    def __init__(self, data_dir: Path, log: Path) -> None:
        self.command = ["graftwork", "serve", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)]
        self.greeting = ""
        self.address = ""
        self._log = log

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C reaches the demo alone, which then ends the server in good order.
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            assert self._process.stdout is not None
            self.greeting = self._process.stdout.readline().strip()
            found = re.search(r" on (\S+:\d+)$", self.greeting)
            if found is None:
                raise DemoError(f"the server did not start; {self._log} says: {self._last_words()}")
            self.address = found[1]
        except BaseException:
            self._end()
            raise
        return self

    def memory_bytes(self) -> int:
        """Memory of the front and the engine now; pages shared by several processes count once."""
        front = psutil.Process(self._process.pid)
        infos = [process.memory_full_info() for process in (front, *front.children(recursive=True))]
        return sum(getattr(info, "pss", info.uss) for info in infos)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = self._end()
        if error is None and code != 0:
            raise DemoError(f"the server ended with exit code {code}; {self._log} says: {self._last_words()}")

    def _end(self) -> int:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "nothing")
