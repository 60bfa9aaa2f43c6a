"""What hostile grammars cost others: a stream's time between tokens beside clients that send them without pause.

    python -m benchmarks.hostile_grammars [--shape 135m] [--rounds 3] [--output FILE.json]

One real server and real clients. A stream is read alone, then beside one and four clients whose requests have ordinary
JSON schemas, then beside as many whose grammars are made to take long. All are new each time, so that none is
remembered. What a client may cost its neighbours is what any request costs them; the aim is that a hostile one's p99 is
less than twice that of an ordinary one. Medians over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.options import parser_of, store
from benchmarks.report import hostile_circumstances, hostile_table, percentile
from benchmarks.server_process import ServerProcess
from benchmarks.shapes import make_model
from graftwork import Client, GraftworkError

PROMPT = list(range(100, 164))
TOKENS = 500
OTHERS_TOKENS = 8
"""At most as many for each request of the others; most hostile ones end before."""
_ENDLESS = "(abcdefghijklmnopqrstuvwxyz%d){60000}"


def ordinary(number: int) -> dict[str, Any]:
    """A JSON schema of thirty required properties, all new."""
    properties = {f"field_{number}_{index}": {"enum": ["a", "b", str(index)]} for index in range(30)}
    return {"json_schema": {"type": "object", "properties": properties, "required": list(properties)}}


def hostile(number: int) -> dict[str, Any]:
    """One of four grammars that take long: for a first mask, in a step, in the lexer, in the parser."""
    terminals = range(900)
    return [
        {"regex": _ENDLESS % number},
        {"regex": "[a-z]{20}" + _ENDLESS % number},
        {"regex": "(a|b|[c-z]{0,9})" * 500 + str(number)},
        {
            "lark": "start: "
            + "|".join(f"T{index}" for index in terminals)
            + "".join(f"\nT{index}: /[a-z]+{index}x{number}/" for index in terminals)
        },
    ][number % 4]


NUMBERS = itertools.count()
CASES: dict[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
    "alone": (0, ordinary),
    "1 ordinary": (1, ordinary),
    "1 hostile": (1, hostile),
    "4 ordinary": (4, ordinary),
    "4 hostile": (4, hostile),
}


@contextmanager
def clients(address: str, count: int, grammar: Callable[[int], dict[str, Any]]) -> Iterator[list[bool]]:
    """Within it, so many clients send one request after another; yields whether each was answered."""
    answered: list[bool] = []
    done = threading.Event()

    def send() -> None:
        with Client(address=address, max_retries=0) as client:
            while not done.is_set():
                try:
                    client.generate("base", PROMPT, max_tokens=OTHERS_TOKENS, **grammar(next(NUMBERS)))
                    answered.append(True)
                except GraftworkError:
                    answered.append(False)

    threads = [threading.Thread(target=send) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        yield answered
    finally:
        done.set()
        for thread in threads:
            thread.join()


def gaps(client: Client) -> list[float]:
    """Milliseconds between a stream's messages."""
    times = []
    with client.generate("base", PROMPT, max_tokens=TOKENS, ignore_eos=True, stream=True) as stream:
        for _ in stream:
            times.append(time.perf_counter())
    return [(after - before) * 1000 for before, after in itertools.pairwise(times)]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases, one after another, in each round."""
    model_dir = make_model(arguments.shape, arguments.work)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory(prefix="graftwork-bench-") as data_dir:
        options = ["--model", str(model_dir), "--data-dir", data_dir, "--threads", str(arguments.threads)]
        options += ["--dtype", arguments.dtype, "--log-level", "warning"]
        with ServerProcess(options) as server, Client(address=server.address) as client:
            gaps(client)
            for _ in range(arguments.rounds):
                for name, (count, grammar) in CASES.items():
                    with clients(server.address, count, grammar) as answered:
                        found = gaps(client)
                    row = {"p50_ms": percentile(found, 0.5), "p99_ms": percentile(found, 0.99), "most_ms": max(found)}
                    rounds[name].append(row | {"answered": sum(answered), "refused": answered.count(False)})
                    print(name, rounds[name][-1], flush=True)
            dtype = server.dtype
    results = [
        {"case": name, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}, "rounds": rows}
        for name, rows in rounds.items()
    ]
    return {
        "benchmark": "hostile_grammars",
        "machine": describe_machine(),
        "shape": arguments.shape,
        "dtype": dtype,
        "threads": arguments.threads,
        "prompt_tokens": len(PROMPT),
        "new_tokens": TOKENS,
        "rounds": arguments.rounds,
        "results": results,
    }


def main() -> None:
    """Measures, prints and stores."""
    arguments = parser_of(__doc__, rounds=3).parse_args()
    measured = measure(arguments)
    print(f"\n{hostile_circumstances(measured)}\n\n{hostile_table(measured)}")
    store(measured, arguments.output)


if __name__ == "__main__":
    main()
