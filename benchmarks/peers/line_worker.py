"""A benchmark side in a process of its own: one job a line on stdin, one measurement a line on stdout.

Its own file without other imports than Python's, because peers run in environments that do not have this project.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

Job = dict[str, Any]
Measured = dict[str, Any]


def answer_lines(measure: Callable[[Job], Measured], distributions: list[str]) -> None:
    """Announces the versions of `distributions`, then measures every job until stdin ends.

    Whatever the peer prints goes to stderr: stdout belongs to the answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"versions": {name: version(name) for name in distributions}}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), file=answers, flush=True)


def with_new_tokens(job: Job, new_tokens: int) -> Job:
    """The same requests, but shorter: a warm-up."""
    return {**job, "new_tokens": min(new_tokens, job["new_tokens"])}


def gaps_ms(times: list[float]) -> list[float]:
    """Milliseconds between neighbouring times in seconds."""
    return [(after - before) * 1000 for before, after in itertools.pairwise(times)]
