"""What ten times the load costs those that are admitted, and how soon the others are refused.

    python -m benchmarks.overload [--shape 135m] [--max-queue 32] [--seconds 30] [--rounds 3] [--output FILE.json]

One real server and a client process of its own. First as many clients as `--max-queue` send one request after another:
the server is full and refuses nothing; what it answers a second is its rate. Then requests come at ten times that rate,
at random times, whether others were answered or not. The aims: the p99 of those admitted at most doubles, and refusals
reach the client within 50 ms. Times are from the call to its end, at the client; medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from benchmarks.common.figures import medians, percentile, show
from benchmarks.common.options import circumstances, parser_of, server_options, store
from benchmarks.common.raw_calls import generate_call, generate_request
from benchmarks.common.server_process import ServerProcess, end_on_sigterm
from benchmarks.common.shapes import make_model
from benchmarks.common.tables import overload_circumstances, overload_table
from benchmarks.workloads.cases import PROMPT

NEW_TOKENS = 32
LOAD = 10


@dataclass
class Seen:
    """Milliseconds of the calls that ended."""

    admitted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)

    def row(self, seconds: float) -> dict[str, float]:
        """Their percentiles and counts."""
        row = {
            "admitted": float(len(self.admitted)),
            "refused": float(len(self.refused)),
            "admitted_per_second": len(self.admitted) / seconds,
            "admitted_p50_ms": percentile(self.admitted, 0.5),
            "admitted_p99_ms": percentile(self.admitted, 0.99),
            "first_token_p99_ms": percentile(self.first_token, 0.99),
        }
        if self.refused:
            row |= {
                "refused_p50_ms": percentile(self.refused, 0.5),
                "refused_p99_ms": percentile(self.refused, 0.99),
                "refused_most_ms": max(self.refused),
            }
        return row


async def one(call: Any, request: bytes, seen: Seen) -> None:
    """One request; raises what is neither an answer nor RESOURCE_EXHAUSTED."""
    started = time.perf_counter()
    first = 0.0
    try:
        async for _ in call(request, timeout=120):
            first = first or (time.perf_counter() - started) * 1000
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        seen.refused.append((time.perf_counter() - started) * 1000)
        return
    seen.first_token.append(first)
    seen.admitted.append((time.perf_counter() - started) * 1000)


async def full(call: Any, request: bytes, clients: int, seconds: float) -> dict[str, float]:
    """So many clients, each one request after another."""
    seen = Seen()
    started = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - started < seconds:
            await one(call, request, seen)

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen.row(time.perf_counter() - started)


async def flooded(call: Any, request: bytes, rate: float, seconds: float) -> dict[str, float]:
    """Requests at random times, so many a second in the mean."""
    seen, draw = Seen(), random.Random(0)
    started = due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        while (due := due + draw.expovariate(rate)) - started < seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(call, request, seen))
    return seen.row(time.perf_counter() - started)


async def compare(address: str, arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Both, alternating."""
    request = generate_request(PROMPT, NEW_TOKENS)
    rounds: dict[str, list[dict[str, float]]] = {"full": [], "ten times": []}
    async with grpc.aio.insecure_channel(address) as channel:
        call = generate_call(channel)
        await full(call, request, arguments.max_queue, 3)
        for _ in range(arguments.rounds):
            rounds["full"].append(await full(call, request, arguments.max_queue, arguments.seconds))
            rate = LOAD * rounds["full"][-1]["admitted_per_second"]
            rounds["ten times"].append(await flooded(call, request, rate, arguments.seconds))
            for name, rows in rounds.items():
                show(name, rows[-1])
    return rounds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One server, all rounds."""
    model_dir = make_model(arguments.shape, arguments.work)
    with tempfile.TemporaryDirectory(prefix="graftwork-bench-") as data_dir:
        options = [*server_options(arguments, model_dir, data_dir), "--max-queue", str(arguments.max_queue)]
        with ServerProcess(options) as server:
            rounds = asyncio.run(compare(server.address, arguments))
            dtype = server.dtype
    return {
        **circumstances("overload", arguments, dtype),
        "max_queue": arguments.max_queue,
        "prompt_tokens": len(PROMPT),
        "new_tokens": NEW_TOKENS,
        "seconds": arguments.seconds,
        "results": medians(rounds),
    }


def main() -> None:
    """Measures, prints and stores."""
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--max-queue", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each half of a round")
    arguments = parser.parse_args()
    end_on_sigterm()
    measured = measure(arguments)
    print(f"\n{overload_circumstances(measured)}\n\n{overload_table(measured)}")
    store(measured, arguments.output)


if __name__ == "__main__":
    main()
