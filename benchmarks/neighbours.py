"""What hostile clients cost others: a stream's time between tokens, and small calls, beside clients that send without
pause what is made to take long.

    python -m benchmarks.neighbours [--shape 135m] [--rounds 3] [--clients 4] [--kinds A,B] [--output FILE.json]

One real server and real clients. A stream is read, an adapter is asked for and another adapter, with a chat template of
its own, is chatted with: alone, then beside clients of each kind (benchmarks/hostile.py) with ordinary requests, then
beside as many with hostile ones. What a client may cost its neighbours is what any request costs them; the aim is that
a hostile one's p99 is at most twice that of an ordinary one. Medians over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.hostile import CHAT, PROMPT, TEMPLATE, Attack, Files, Kind, Refused, kinds
from benchmarks.hot_load import small_adapter
from benchmarks.options import circumstances, parser_of, server_options, store
from benchmarks.report import neighbours_circumstances, neighbours_table, percentile
from benchmarks.server_process import ServerProcess, end_on_sigterm
from benchmarks.shapes import make_adapters, make_model
from graftwork import Client, GraftworkError

TOKENS = 500
CALL_SECONDS = 0.05
"""Between two small calls."""
NUMBERS = itertools.count()


@contextmanager
def clients(address: str, count: int, attack: Attack) -> Iterator[list[bool]]:
    """Within it, so many clients send one request after another; yields whether each was answered."""
    answered: list[bool] = []
    done = threading.Event()

    def send() -> None:
        with Client(address=address, max_retries=0) as client:
            while not done.is_set():
                try:
                    attack(client, next(NUMBERS))
                    answered.append(True)
                except (GraftworkError, Refused):
                    answered.append(False)

    with ThreadPoolExecutor(max(count, 1)) as threads:
        running = [threads.submit(send) for _ in range(count)]
        try:
            time.sleep(0.5)
            yield answered
        finally:
            done.set()
        for client in running:
            client.result()


@contextmanager
def repeated(call: Callable[[], Any]) -> Iterator[list[float]]:
    """Within it, `call` is made again and again; yields the milliseconds of each."""
    times: list[float] = []
    done = threading.Event()

    def run() -> None:
        while not done.wait(CALL_SECONDS):
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1000)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield times
    finally:
        done.set()
        thread.join()


def gaps(client: Client) -> list[float]:
    """Milliseconds between a stream's messages."""
    times = []
    with client.generate("base", PROMPT, max_tokens=TOKENS, ignore_eos=True, stream=True) as stream:
        for _ in stream:
            times.append(time.perf_counter())
    return [(after - before) * 1000 for before, after in itertools.pairwise(times)]


def observe(client: Client, server: ServerProcess) -> dict[str, float]:
    """What a neighbour sees while it reads one stream."""
    with (
        repeated(lambda: client.adapters.get("neighbour")) as reads,
        repeated(lambda: client.chat("neighbour", CHAT, max_tokens=1)) as chats,
    ):
        found = gaps(client)
    front = psutil.Process(server.process_id)
    return {
        "p50_ms": percentile(found, 0.5),
        "p99_ms": percentile(found, 0.99),
        "most_ms": max(found),
        "get_p99_ms": percentile(reads, 0.99),
        "chat_p99_ms": percentile(chats, 0.99),
        "front_mb": front.memory_info().rss / 1e6,
        "processes": len(front.children(recursive=True)),
    }


def cases(found: list[Kind], count: int) -> list[tuple[str, int, Attack]]:
    """Name, number of clients and what each sends."""
    rows: list[tuple[str, int, Attack]] = [("alone", 0, found[0].ordinary)]
    for kind in found:
        rows.append((f"{kind.name}, ordinary", count, kind.ordinary))
        rows.append((f"{kind.name}, hostile", count, kind.hostile))
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases, one after another, in each round."""
    model_dir = make_model(arguments.shape, arguments.work)
    large = make_adapters(model_dir, ["r16-0"])[0]
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="graftwork-bench-") as data_dir:
        folder = Path(data_dir, "files")
        folder.mkdir()
        files = Files(small_adapter(large, folder / "small", 1), model_dir / "tokenizer.json", folder)
        options = server_options(arguments, model_dir, Path(data_dir, "data"))
        with ServerProcess(options) as server, Client(address=server.address) as client:
            client.adapters.create("neighbour", files.make("neighbour", template=TEMPLATE))
            chosen = [
                kind
                for kind in kinds(files, client, arguments.clients)
                if not arguments.kinds or kind.name in arguments.kinds.split(",")
            ]
            gaps(client)
            for _ in range(arguments.rounds):
                for name, count, attack in cases(chosen, arguments.clients):
                    with clients(server.address, count, attack) as answered:
                        row = observe(client, server)
                    row |= {"answered": sum(answered), "refused": answered.count(False)}
                    rounds.setdefault(name, []).append(row)
                    print(name, {key: round(value, 1) for key, value in row.items()}, flush=True)
            dtype = server.dtype
    results = [
        {"case": name, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}, "rounds": rows}
        for name, rows in rounds.items()
    ]
    return {
        **circumstances("neighbours", arguments, dtype),
        "clients": arguments.clients,
        "prompt_tokens": len(PROMPT),
        "new_tokens": TOKENS,
        "results": results,
    }


def main() -> None:
    """Measures, prints and stores."""
    end_on_sigterm()
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--clients", type=int, default=4, help="clients that send without pause")
    parser.add_argument("--kinds", default="", help="names of kinds with commas between; all by default")
    arguments = parser.parse_args()
    measured = measure(arguments)
    print(f"\n{neighbours_circumstances(measured)}\n\n{neighbours_table(measured)}")
    store(measured, arguments.output)


if __name__ == "__main__":
    main()
