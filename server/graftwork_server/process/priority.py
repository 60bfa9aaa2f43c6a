"""What a process does so that serving comes first where others compute beside it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

_SPINS = 1000
_SPINS_VARIABLE = "GOMP_SPINCOUNT"
_ATTEMPTS = 5


def step_back(niceness: int, oom_score: int, pid: int | None = None) -> None:
    """Lowers a process's claim on processors, and offers it when the kernel kills for memory (0 to 1000, first).

    `pid`: a process that this one has just started, before it has threads of its own; None: this process.
    Where Linux groups processes by session (sched(7), autogroup), niceness counts within a session only: a session's
    leader lowers the claim of all of it.
    """
    pid = os.getpid() if pid is None else pid
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid) + niceness)
        if os.getsid(pid) == pid:
            _write(pid, "autogroup", niceness)
        _write(pid, "oom_score_adj", oom_score)


def _write(pid: int, file: str, value: int) -> None:
    """Tells the kernel about a process, where it can be told."""
    with contextlib.suppress(OSError):
        for _ in range(_ATTEMPTS):
            try:
                Path(f"/proc/{pid}", file).write_text(str(value))
            except BlockingIOError:  # it takes one change of an autogroup in 100 ms, of all that are not privileged
                time.sleep(0.1)
            else:
                return


def yielding(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process whose threads wait for each other only shortly before they sleep.

    GNU's OpenMP lets them spin 300,000 times. While a process of others has one of the cores, that is for nothing: a
    thread holds the core that the one it waits for needs, in each of the hundreds of waits of a step
    (benchmarks/foreign_load.py). A thousand times cover a wait among threads that all run.
    """
    if "OMP_WAIT_POLICY" in environment:
        return dict(environment)
    return {_SPINS_VARIABLE: str(_SPINS)} | dict(environment)
