"""What a process does so that serving comes first where others compute beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

_SPINS = 1000
_SPINS_VARIABLE = "GOMP_SPINCOUNT"


def step_back(niceness: int, oom_score: int) -> None:
    """Lowers this process's claim on processors, and offers it when the kernel kills for memory (0 to 1000, first).

    Where Linux groups processes by session (sched(7), autogroup), niceness counts within a session only: a session's
    leader lowers the claim of all of it.
    """
    os.nice(niceness)
    leads = os.getsid(0) == os.getpid()
    for file, value in {"autogroup": niceness if leads else None, "oom_score_adj": oom_score}.items():
        with contextlib.suppress(OSError):
            if value is not None:
                Path("/proc/self", file).write_text(str(value))


def yielding(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process whose threads wait for each other only shortly before they sleep.

    GNU's OpenMP lets them spin 300,000 times. While a process of others has one of the cores, that is for nothing: a
    thread holds the core that the one it waits for needs, in each of the hundreds of waits of a step
    (benchmarks/foreign_load.py). A spin of some 20 microseconds covers a wait among threads that all run.
    """
    if "OMP_WAIT_POLICY" in environment:
        return dict(environment)
    return {_SPINS_VARIABLE: str(_SPINS)} | dict(environment)
