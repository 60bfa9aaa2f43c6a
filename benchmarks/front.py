"""What the front costs: this server over gRPC against its own engine in process.

    python -m benchmarks.front [--streams 64] [--rounds 5] [--output benchmarks/results/front.json]

Both answer the same requests with the small model on board. The engine's side is `Engine.step` in a loop, in a process
of its own. The server's side is a real one, front and engine, and a client in this process that asks gRPC for bytes
and looks into the last message only, so that little of what is measured is the client's. Client, front and engine share
the machine: the engine has --threads threads on both sides, and what else runs takes what is left of the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from typing import Any

import grpc.aio

from benchmarks.common.machine import describe_machine
from benchmarks.common.options import plain_parser, store
from benchmarks.common.raw_calls import generate_call, generate_request
from benchmarks.common.server_process import ServerProcess, end_on_sigterm
from benchmarks.common.sides import Measure, PeerSide
from benchmarks.common.tables import front_circumstances, front_table
from benchmarks.workloads.cases import PROMPT_TOKENS, Case
from graftwork.v1 import generation_pb2 as pb
from graftwork_server.config import DEMO_MODEL

NEW_TOKENS = 128
SINGLE_REQUESTS = 20
"""A first token takes a few milliseconds: a round's figure is the median of so many requests, one after another."""


async def send(address: str, job: dict[str, Any]) -> dict[str, Any]:
    """All requests of the job at once, each on a stream of its own."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = generate_call(channel)
        await _send(call, {**job, "new_tokens": min(2, job["new_tokens"])})
        return await _send(call, job)


async def _send(call: Any, job: dict[str, Any]) -> dict[str, Any]:
    first: list[float] = []

    async def one(prompt: list[int]) -> None:
        last = None
        async for message in call(generate_request(prompt, job["new_tokens"]), timeout=300):
            if last is None:
                first.append((time.perf_counter() - started) * 1000)
            last = message
        produced = pb.GenerateResponse.FromString(last or b"").usage.completion_tokens
        if produced != job["new_tokens"]:
            raise RuntimeError(f"{produced} tokens came instead of {job['new_tokens']}")

    started = time.perf_counter()
    await asyncio.gather(*(one(prompt) for prompt in job["prompts"]))
    return {"seconds": time.perf_counter() - started, "first_ms": first}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternates the two sides and returns what was measured."""
    many = Case("streams", "", arguments.streams, 0, new_tokens=NEW_TOKENS)
    single = Case("single", "", 1, 0, new_tokens=1)
    rates: dict[str, list[float]] = {"engine": [], "server": []}
    firsts: dict[str, list[float]] = {"engine": [], "server": []}
    command = [sys.executable, "-m", "benchmarks.common.engine_in_process", str(DEMO_MODEL)]
    engine = PeerSide([*command, arguments.dtype, str(arguments.threads)])
    with tempfile.TemporaryDirectory(prefix="graftwork-bench-") as data_dir:
        options = ["--data-dir", data_dir, "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
        with ServerProcess([*options, "--log-level", "warning"]) as server, engine:
            sides: dict[str, Measure] = {
                "engine": engine.measure,
                "server": lambda job: asyncio.run(send(server.address, job)),
            }
            for round_number in range(arguments.rounds):
                for name, run in sides.items():
                    rates[name].append(many.requests * NEW_TOKENS / run(many.job())["seconds"])
                    singles = [run(single.job())["first_ms"][0] for _ in range(SINGLE_REQUESTS)]
                    firsts[name].append(statistics.median(singles))
                    print(
                        f"round {round_number + 1}, {name}: {rates[name][-1]:.0f} tok/s, "
                        f"first token {firsts[name][-1]:.2f} ms",
                        flush=True,
                    )
            dtype = server.dtype
    return {
        "benchmark": "front",
        "machine": describe_machine(),
        "dtype": dtype,
        "streams": arguments.streams,
        "threads": arguments.threads,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": arguments.rounds,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "first_token_ms": {name: statistics.median(values) for name, values in firsts.items()},
        "tokens_per_second_rounds": rates,
        "first_token_ms_rounds": firsts,
    }


def main() -> None:
    """Measures, prints and stores."""
    parser = plain_parser(__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    end_on_sigterm()
    measured = measure(arguments)
    print(f"\n{front_circumstances(measured)}\n\n{front_table(measured)}")
    store(measured, arguments.output)


if __name__ == "__main__":
    main()
