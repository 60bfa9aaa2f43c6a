"""Serving many adapters: this server against transformers + PEFT's mixed-batch generate, in one run.

    python benchmarks/serving.py [--shape 135m] [--requests 16] [--rounds 3] [--output benchmarks/results/NAME.json]

Both sides answer the same 16 requests (64 prompt and 32 new tokens, greedy, end-of-sequence ignored) at once, with the
same weights, dtype and number of threads: with the base only, on one adapter, and on as many adapters as requests.
Ours is measured from outside: a real server process, a real client, every token streamed over gRPC. PEFT runs in a
process of its own; its prompts are equally long, so its batch has no padding, which is its best case. Rounds of both
sides alternate, so that a disturbance of the machine hits both; figures are medians, after a warm-up of each case.
Printed are tokens per second and the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.server_process import ServerProcess
from benchmarks.shapes import make_adapters, make_model
from graftwork import AsyncClient

PROMPT_TOKENS = 64
NEW_TOKENS = 32
CASES = ("base only", "1 adapter", "all adapters")


def prompts(count: int, vocabulary: int = 4000) -> list[list[int]]:
    """The same random prompts for both sides."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, vocabulary, (count, PROMPT_TOKENS), generator=generator).tolist()


def adapter_of(case: str, index: int) -> int | None:
    """Which adapter request `index` uses."""
    return {"base only": None, "1 adapter": 0, "all adapters": index}[case]


# ------------------------------------------------------------------------------------------------- transformers + PEFT


def peft_worker(arguments: argparse.Namespace) -> None:
    """Reads a case per line from stdin, answers with the seconds that it took. Runs in a process of its own."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    model_dir = make_model(arguments.shape, arguments.work)
    adapters = make_adapters(model_dir, arguments.requests)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, arguments.dtype)).eval()
    model: Any = PeftModel.from_pretrained(base, adapters[0], adapter_name="a0")
    for index, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=f"a{index}")
    model.eval()
    ids = torch.tensor(prompts(arguments.requests))
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def generate(case: str, new_tokens: int) -> None:
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        with torch.inference_mode():
            if case == "base only":
                with model.disable_adapter():
                    model.generate(input_ids=ids, **length, **settings)
            elif case == "1 adapter":
                model.set_adapter("a0")
                model.generate(input_ids=ids, **length, **settings)
            else:
                names = [f"a{index}" for index in range(len(ids))]
                model.generate(input_ids=ids, adapter_names=names, **length, **settings)

    for line in sys.stdin:
        case = line.strip()
        generate(case, 2)
        started = time.perf_counter()
        generate(case, NEW_TOKENS)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


class PeftSide:
    """The other side, in its own process."""

    def __init__(self, arguments: argparse.Namespace, dtype: str) -> None:
        command = [sys.executable, "-m", "benchmarks.serving", "--peft-worker", "--dtype", dtype]
        command += ["--shape", arguments.shape, "--requests", str(arguments.requests)]
        command += ["--threads", str(arguments.threads), "--work", str(arguments.work)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, case: str) -> float:
        """Seconds that the case took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline())["seconds"])

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


# ------------------------------------------------------------------------------------------------------ this server


async def our_round(address: str, case: str, requests: int) -> tuple[float, float]:
    """Seconds until the last token of all requests, and the median time to first token in ms."""
    async with AsyncClient(address=address) as client:
        first_tokens: list[float] = []

        async def one(index: int, prompt: list[int], new_tokens: int) -> None:
            adapter = adapter_of(case, index)
            model = "base" if adapter is None else f"a{adapter}"
            started = time.perf_counter()
            first = None
            count = 0
            stream = await client.generate(model, prompt, max_tokens=new_tokens, ignore_eos=True, stream=True)
            async for chunk in stream:
                if chunk.token_ids and first is None:
                    first = time.perf_counter() - started
                count += len(chunk.token_ids)
            assert count == new_tokens
            assert first is not None
            first_tokens.append(first * 1000)

        everything = prompts(requests)
        await asyncio.gather(*(one(index, prompt, 2) for index, prompt in enumerate(everything)))
        first_tokens.clear()
        started = time.perf_counter()
        await asyncio.gather(*(one(index, prompt, NEW_TOKENS) for index, prompt in enumerate(everything)))
        return time.perf_counter() - started, statistics.median(first_tokens)


async def upload(address: str, adapters: list[Path]) -> list[float]:
    """Uploads and loads the adapters; the load times in ms, as the server reports them."""
    times = []
    async with AsyncClient(address=address) as client:
        for index, adapter in enumerate(adapters):
            await client.adapters.create(f"a{index}", adapter)
            report = (await client.adapters.load(f"a{index}")).load_report
            assert report is not None
            times.append(report.load_ms)
    return times


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs both sides and returns what was measured."""
    model_dir = make_model(arguments.shape, arguments.work)
    adapters = make_adapters(model_dir, arguments.requests)
    tokens = arguments.requests * NEW_TOKENS
    ours: dict[str, list[float]] = {case: [] for case in CASES}
    theirs: dict[str, list[float]] = {case: [] for case in CASES}
    first_tokens: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory(prefix="graftwork-bench-") as data_dir:
        options = ["--model", str(model_dir), "--data-dir", data_dir, "--threads", str(arguments.threads)]
        options += ["--dtype", arguments.dtype, "--log-level", "warning"]
        with ServerProcess(options) as server:
            loads = asyncio.run(upload(server.address, adapters))
            peft = PeftSide(arguments, server.dtype)
            try:
                for round_number in range(arguments.rounds):
                    for case in CASES:
                        seconds, first = asyncio.run(our_round(server.address, case, arguments.requests))
                        ours[case].append(tokens / seconds)
                        first_tokens[case].append(first)
                        theirs[case].append(tokens / peft.run(case))
                        print(
                            f"round {round_number + 1}, {case}: graftwork {ours[case][-1]:.1f} tok/s, "
                            f"transformers + PEFT {theirs[case][-1]:.1f} tok/s",
                            flush=True,
                        )
            finally:
                peft.close()
            dtype = server.dtype
    return {
        "benchmark": "serving",
        "machine": describe_machine(),
        "shape": arguments.shape,
        "dtype": dtype,
        "threads": arguments.threads,
        "requests": arguments.requests,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": arguments.rounds,
        "hot_load_ms_median": statistics.median(loads),
        "results": [
            {
                "case": case if case != "all adapters" else f"{arguments.requests} adapters",
                "graftwork_tokens_per_second": statistics.median(ours[case]),
                "peft_tokens_per_second": statistics.median(theirs[case]),
                "ratio": statistics.median(ours[case]) / statistics.median(theirs[case]),
                "graftwork_first_token_ms": statistics.median(first_tokens[case]),
                "graftwork_rounds": ours[case],
                "peft_rounds": theirs[case],
            }
            for case in CASES
        ],
    }


def table(measured: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    machine = measured["machine"]
    lines = [
        f"{measured['shape']} Llama shape, {measured['dtype']}, {measured['requests']} requests of "
        f"{measured['prompt_tokens']} + {measured['new_tokens']} tokens at once, {measured['threads']} threads; "
        f"{machine['processor']}, {machine['cores']} cores; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, PEFT {machine['peft']}; medians of {measured['rounds']} rounds in one run.",
        "",
        "| | Graftwork (server, over gRPC) | transformers + PEFT `generate` | ratio |",
        "|---|---|---|---|",
    ]
    for row in measured["results"]:
        lines.append(
            f"| {row['case']} | {row['graftwork_tokens_per_second']:.1f} tok/s "
            f"| {row['peft_tokens_per_second']:.1f} tok/s | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16, for both sides")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peft-worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peft_worker:
        peft_worker(arguments)
        return
    measured = measure(arguments)
    print("\n" + table(measured))
    if arguments.output:
        arguments.output.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
