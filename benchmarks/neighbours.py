"""What hostile clients cost others: a stream's time between tokens, and small calls, beside clients that send without
pause what is made to take long.

    python -m benchmarks.neighbours [--shape 135m] [--rounds 3] [--clients 4] [--kinds A,B] [--output FILE.json]

One real server and real clients. A stream is read, an adapter is asked for and another adapter, with a chat template of
its own, is chatted with: alone, then beside clients of each kind with ordinary requests, then beside as many with
hostile ones. They run in a process of their own (benchmarks/workloads/hostile.py). What a client may cost its
neighbours is what any request costs them; the aim is that a hostile one's p99 is at most twice that of an ordinary one.
Medians over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.figures import medians, percentile, show
from benchmarks.common.options import circumstances, parser_of, server_options, store
from benchmarks.common.server_process import ServerProcess, end_on_sigterm
from benchmarks.common.shapes import make_adapters, make_model, small_adapter
from benchmarks.common.sides import PeerSide
from benchmarks.common.tables import neighbours_circumstances, neighbours_table
from benchmarks.workloads.cases import PROMPT
from benchmarks.workloads.hostile import CHAT, TEMPLATE, adapter_with, kinds, make_files
from graftwork import Client

TOKENS = 500
CALL_SECONDS = 0.05
"""Between two small calls."""
Job = dict[str, Any]
"""What the clients beside are told (benchmarks/workloads/hostile.py); an empty one: there are none."""


@contextmanager
def beside(clients: PeerSide, job: Job) -> Iterator[dict[str, float]]:
    """Within it, those clients send; yields how many of their requests were answered and refused, once it has ended."""
    counts: dict[str, float] = {"answered": 0, "refused": 0}
    if not job:
        yield counts
        return
    clients.measure(job)
    yield counts
    counts |= clients.measure({})


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


def cases(chosen: str, count: int) -> list[tuple[str, Job]]:
    """Name of each case, and the clients beside; `chosen` names kinds with commas between, all if it is empty."""
    rows: list[tuple[str, Job]] = [("alone", {})]
    for kind in kinds(Path(), count):
        if not chosen or kind in chosen.split(","):
            rows += [(f"{kind}, {way}", {"kind": kind, "hostile": way == "hostile"}) for way in ("ordinary", "hostile")]
    return rows


def prepare(client: Client, model_dir: Path, folder: Path, clients: int) -> None:
    """Makes all files under `folder`, and uploads the adapters that are chatted with."""
    folder.mkdir()
    small = small_adapter(make_adapters(model_dir, ["r16-0"])[0], folder / "small", 1)
    uploads = make_files(small, model_dir / "tokenizer.json", folder, clients)
    uploads.append(adapter_with(small, folder / "neighbour", "chat_template.jinja", TEMPLATE))
    for upload in uploads:
        client.adapters.create(upload.name, upload)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases, one after another, in each round."""
    model_dir = make_model(arguments.shape, arguments.work)
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="graftwork-bench-") as data_dir:
        folder = Path(data_dir, "files")
        options = server_options(arguments, model_dir, Path(data_dir, "data"))
        with ServerProcess(options) as server, Client(address=server.address) as client:
            prepare(client, model_dir, folder, arguments.clients)
            command = [sys.executable, "-m", "benchmarks.workloads.hostile", server.address, str(folder)]
            with PeerSide([*command, str(arguments.clients)]) as clients:
                gaps(client)
                for _ in range(arguments.rounds):
                    for name, job in cases(arguments.kinds, arguments.clients):
                        with beside(clients, job) as counts:
                            row = observe(client, server)
                        row |= counts
                        rounds.setdefault(name, []).append(row)
                        show(name, row)
            dtype = server.dtype
    return {
        **circumstances("neighbours", arguments, dtype),
        "clients": arguments.clients,
        "prompt_tokens": len(PROMPT),
        "new_tokens": TOKENS,
        "results": medians(rounds),
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
