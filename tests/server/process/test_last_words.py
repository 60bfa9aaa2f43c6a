"""No thread of a worker dies silently: what nobody expected ends the process with a word, and never hangs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graftwork_server.process.last_words import EXIT_CODE

HEAD = """
import threading, time
from graftwork_server import logs
from graftwork_server.process.last_words import exit_when_a_thread_dies
from graftwork_server.engine.helper_threads import HelperThreads
logs.set_up("info", "text")
exit_when_a_thread_dies()
def fail():
    raise KeyError("the cause")
"""
THREADS = {
    "a thread": "threading.Thread(target=fail, name='reader', daemon=True).start()",
    "a helper": "HelperThreads(1, 'reader', lambda: None).submit(fail)",
}


@pytest.mark.parametrize("kind", THREADS)
def test_a_dead_thread_ends_its_process(kind: str) -> None:
    code = f"{HEAD}\n{THREADS[kind]}\ntime.sleep(3600)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == EXIT_CODE
    assert "this process ends: KeyError in thread reader" in done.stderr
    assert "the cause" in done.stderr
