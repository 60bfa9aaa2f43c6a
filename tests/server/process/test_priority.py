"""Who comes first on a machine's processors, as its kernel sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftwork_server.process.priority import step_back, yielding

REPORT = """
import json, os
from pathlib import Path
from graftwork_server.process.priority import step_back
group = Path("/proc/self/autogroup")
read = lambda: group.read_text().split() if group.exists() else None
before = read()
step_back(7, 300)
score = Path("/proc/self/oom_score_adj").read_text().strip()
print(json.dumps([os.nice(0), score, before, read()]))
"""


def stepped_back(*, leads: bool) -> list[Any]:
    """Niceness, OOM score and autogroup, before and after, of a process that stepped back."""
    result = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, check=True, start_new_session=leads)
    found: list[Any] = json.loads(result.stdout)
    return found


def test_a_process_and_its_session_step_back() -> None:
    niceness, score, before, after = stepped_back(leads=True)
    assert (niceness, score) == (7, "300")
    if before is None:
        pytest.skip("this kernel has no groups of sessions")
    assert before[-1] == "0"
    assert after[-1] == "7"


def test_a_process_leaves_the_session_of_others_alone() -> None:
    niceness, _, before, after = stepped_back(leads=False)
    assert niceness == 7
    assert before == after


def test_a_process_that_was_just_started_is_set_back_from_outside() -> None:
    """Before it has run a line of its own: what it imports already counts as a helper's work."""
    waits = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(waits, stdin=subprocess.PIPE, start_new_session=True)
    try:
        step_back(7, 300, child.pid)
        proc = Path(f"/proc/{child.pid}")
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 7
        assert (proc / "oom_score_adj").read_text().strip() == "300"
        if not (proc / "autogroup").exists():
            pytest.skip("this kernel has no groups of sessions")
        assert (proc / "autogroup").read_text().split()[-1] == "7"
    finally:
        child.communicate(b"\n")
    step_back(7, 300, child.pid)  # of one that has ended, nothing


def test_waits_are_short_unless_an_operator_chose() -> None:
    assert yielding({"HOME": "/x"}) == {"GOMP_SPINCOUNT": "1000", "HOME": "/x"}
    assert yielding({"GOMP_SPINCOUNT": "7"}) == {"GOMP_SPINCOUNT": "7"}
    assert yielding({"OMP_WAIT_POLICY": "ACTIVE"}) == {"OMP_WAIT_POLICY": "ACTIVE"}
