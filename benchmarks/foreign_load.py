"""What a process of others that keeps one core busy costs a stream, with GNU OpenMP's own waits and with the server's.

    python -m benchmarks.foreign_load [--shape 135m] [--rounds 3] [--output FILE.json]

One real server with as many threads as cores, and a stream of one request: alone, beside a busy process of the same
priority, and beside one that steps back as the server's own helper processes do. With 300,000 spins a wait, which is
libgomp's default, and with those that the server sets (graftwork_server/process/priority.py). Medians over alternating
rounds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.common.options import circumstances, parser_of, server_options, store
from benchmarks.common.server_process import ServerProcess, end_on_sigterm
from benchmarks.common.shapes import make_model
from benchmarks.workloads.cases import PROMPT
from graftwork import Client
from graftwork_server.process.priority import yielding
from graftwork_server.text.strangers.helper import NICENESS

LIBRARY_SPINS = "300000"
SPINS = {"libgomp's own": LIBRARY_SPINS, "the server's": yielding({})["GOMP_SPINCOUNT"]}
STEP_BACK = f"from graftwork_server.process.priority import step_back; step_back({NICENESS}, 1000)"
LOADS = {"alone": None, "beside a busy process": "", "beside one that steps back": STEP_BACK}
TOKENS = {"alone": 200, "beside a busy process": 20, "beside one that steps back": 20}


@contextmanager
def busy(code: str | None) -> Iterator[None]:
    """Within it, a process of a session of its own computes without end."""
    if code is None:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", f"{code}\nwhile True: pass"], start_new_session=True)
    try:
        time.sleep(1.0)
        yield
    finally:
        process.kill()
        process.wait()


def milliseconds_per_token(client: Client, tokens: int) -> float:
    """The mean time between a stream's tokens."""
    times = []
    with client.generate("base", PROMPT, max_tokens=tokens, ignore_eos=True, stream=True) as stream:
        for _ in stream:
            times.append(time.perf_counter())
    return (times[-1] - times[0]) * 1000 / (len(times) - 1)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases on a server of each kind, one after another, in each round."""
    model_dir = make_model(arguments.shape, arguments.work)
    rounds: dict[tuple[str, str], list[float]] = {}
    for _, (name, spins) in itertools.product(range(arguments.rounds), SPINS.items()):
        os.environ["GOMP_SPINCOUNT"] = spins
        with (
            tempfile.TemporaryDirectory(prefix="graftwork-bench-") as data_dir,
            ServerProcess(server_options(arguments, model_dir, data_dir)) as server,
            Client(address=server.address) as client,
        ):
            milliseconds_per_token(client, 20)
            for load, code in LOADS.items():
                with busy(code):
                    rounds.setdefault((load, name), []).append(milliseconds_per_token(client, TOKENS[load]))
                print(f"{load}, {name} waits: {rounds[load, name][-1]:.1f} ms a token", flush=True)
            dtype = server.dtype
    return {
        **circumstances("foreign_load", arguments, dtype),
        "results": [
            {
                "load": load,
                "waits": name,
                "spins": int(SPINS[name]),
                "ms_per_token": statistics.median(times),
                "all": times,
            }
            for (load, name), times in rounds.items()
        ],
    }


def main() -> None:
    """Measures, prints and stores."""
    end_on_sigterm()
    arguments = parser_of(__doc__, rounds=3).parse_args()
    measured = measure(arguments)
    for row in measured["results"]:
        print(f"{row['load']}, {row['waits']} waits: {row['ms_per_token']:.1f} ms a token")
    store(measured, arguments.output)


if __name__ == "__main__":
    main()
