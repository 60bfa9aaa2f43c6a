"""Hot load: the first token of an adapter that is not loaded, against one that is, with few and many registered.

    python -m benchmarks.hot_load [--shape 135m] [--rounds 40] [--registered 1 100 1000] [--output FILE.json]

One real server process, one real client; every figure is the time from the call to the first token over gRPC. Each
round unloads an adapter, asks it (cold: read, checked, bound, copied into a slot, run), then asks it again (warm), with
the same prompt, and the answers must be equal. Up to 16 adapters are of rank 16 on every linear layer (9.8 MB with the
135m shape) and take turns; those beyond are of rank 1 on one projection, each with weights of its own, so that a
thousand uploads take seconds and not a disk. Medians; the aim is a difference of at most 15 ms, however many are
registered. Last, two adapters take turns in a pool with room for one, with the host cache and without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.options import circumstances, parser_of, server_options, store
from benchmarks.common.server_process import ServerProcess
from benchmarks.common.shapes import make_adapters, make_model, small_adapter
from benchmarks.common.tables import hot_load_circumstances, hot_load_table
from benchmarks.workloads.cases import PROMPT
from graftwork import Client

LARGE = 16


def first_token(client: Client, model: str) -> tuple[float, int]:
    """Milliseconds to the first token, and the token."""
    started = time.perf_counter()
    with client.generate(model, PROMPT, max_tokens=2, ignore_eos=True, stream=True) as stream:
        token = next(stream).token_ids[0]
        milliseconds = (time.perf_counter() - started) * 1000
        for _ in stream:
            pass
    return milliseconds, token


def register(client: Client, count: int, present: int, large: list[Path], folder: Path) -> float:
    """Uploads adapters until `count` are registered; seconds that it took."""
    started = time.perf_counter()
    for index in range(present, count):
        if index < len(large):
            client.adapters.create(f"large-{index}", large[index])
        else:
            client.adapters.create(f"small-{index}", small_adapter(large[0], folder / str(index), index))
    seconds = time.perf_counter() - started
    os.sync()  # else the system still writes uploads to disk while loads are measured
    return seconds


def compare(client: Client, adapters: list[str], rounds: int) -> dict[str, Any]:
    """Cold and warm first tokens of adapters that take turns, in ms."""
    cold, warm, loads, device_bytes = [], [], [], 0
    for index in range(rounds + 2):
        name = adapters[index % len(adapters)]
        client.adapters.unload(name)
        cold_ms, cold_token = first_token(client, name)
        warm_ms, warm_token = first_token(client, name)
        if cold_token != warm_token:
            raise RuntimeError(f"{name} answered {cold_token} when cold and {warm_token} when warm")
        client.adapters.unload(name)
        report = client.adapters.load(name).load_report
        assert report is not None
        if index >= 2:  # before that, code is cold too
            cold.append(cold_ms)
            warm.append(warm_ms)
            loads.append(report.load_ms)
            device_bytes = report.device_bytes
    return {
        "warm_first_token_ms": statistics.median(warm),
        "cold_first_token_ms": statistics.median(cold),
        "difference_ms": statistics.median(cold) - statistics.median(warm),
        "load_call_ms": statistics.median(loads),
        "cold_rounds_ms": cold,
        "warm_rounds_ms": warm,
        "adapter_bytes": device_bytes,
    }


def evicted(server: ServerProcess, large: list[Path], rounds: int) -> float:
    """By how many ms the first token comes later where two adapters evict each other from a pool with room for one."""
    with Client(address=server.address) as client:
        for index, directory in enumerate(large[:2]):
            client.adapters.create(f"large-{index}", directory)
        cold: list[float] = []
        warm: list[float] = []
        for index in range(rounds + 4):
            for times in (cold, warm):
                times.append(first_token(client, f"large-{index % 2}")[0])
    return statistics.median(cold[4:]) - statistics.median(warm[4:])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One server; more and more adapters registered."""
    model_dir = make_model(arguments.shape, arguments.work)
    large = make_adapters(model_dir, [f"r16-{index}" for index in range(LARGE)])
    results = []
    with tempfile.TemporaryDirectory(prefix="graftwork-bench-") as folder:
        options = server_options(arguments, model_dir, f"{folder}/data")
        with ServerProcess(options) as server, Client(address=server.address) as client:
            present = 0
            for count in sorted(arguments.registered):
                seconds = register(client, count, present, large, Path(folder))
                present = count
                turns = [f"large-{index}" for index in range(min(count, LARGE))]
                row = {"registered": count, "upload_seconds": seconds} | compare(client, turns, arguments.rounds)
                results.append(row)
                print(f"{count} registered: the load adds {row['difference_ms']:.1f} ms", flush=True)
            dtype = server.dtype
        pool = ["--adapter-memory-bytes", str(results[0]["adapter_bytes"] * 3 // 2)]
        came_back = {}
        for name, host_cache in (("files", 0), ("host cache", 1 << 30)):
            options = server_options(arguments, model_dir, f"{folder}/{name}")
            with ServerProcess([*options, *pool, "--host-cache-bytes", str(host_cache)]) as server:
                came_back[name] = evicted(server, large, arguments.rounds)
    return {
        **circumstances("hot_load", arguments, dtype),
        "prompt_tokens": len(PROMPT),
        "large_adapters": LARGE,
        "results": results,
        "evicted_difference_ms": came_back,
    }


def main() -> None:
    """Measures, prints and stores."""
    parser = parser_of(__doc__, rounds=40)
    parser.add_argument("--registered", type=int, nargs="+", default=[1, 100, 1000])
    arguments = parser.parse_args()
    measured = measure(arguments)
    print(f"\n{hot_load_circumstances(measured)}\n\n{hot_load_table(measured)}")
    store(measured, arguments.output)


if __name__ == "__main__":
    main()
