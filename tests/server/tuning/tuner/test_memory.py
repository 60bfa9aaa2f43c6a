"""What a job's peak memory counts: what was held and given back, and of what is shared its own part."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

_MIB = 2**20
_CHILD = """
import mmap, sys
from graftwork_server.tuning.tuner.memory import peak_memory
shared = mmap.mmap(int(sys.argv[1]), 0)
assert sum(shared[::4096]) == 0
print(peak_memory("cpu"))
held = bytearray(b"x" * (100 << 20))
del held
print(peak_memory("cpu"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells")
def test_what_is_shared_counts_in_part_and_what_was_given_back_in_full() -> None:
    file = os.memfd_create("shared")
    try:
        os.ftruncate(file, 200 * _MIB)
        with mmap.mmap(file, 0) as ours:
            ours[:] = bytes(len(ours))
            command = [sys.executable, "-c", _CHILD, str(file)]
            output = subprocess.run(command, pass_fds=[file], capture_output=True, check=True, text=True).stdout
    finally:
        os.close(file)
    before, after = (int(line) / _MIB for line in output.split())
    assert 100 < before < 200  # half of what is shared, and Python
    # The bytes and their copy. Something like Python's own pages may have come to be shared by others meanwhile.
    assert 180 < after - before < 220
