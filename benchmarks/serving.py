"""Serving many adapters, side by side in one run: this server, transformers + PEFT, and vLLM and llama.cpp if given.

    python -m benchmarks.serving [--quick] [--cases base-16,16-16] [--vllm DIR] [--llama-cpp DIR] [--output FILE]

All sides answer the same requests (the same token ids, greedy, end-of-sequence ignored) with the same weights, dtype
and number of threads. Servers, ours and vLLM's, are measured from outside: real processes, a real client, every token
streamed. PEFT and llama.cpp run in processes of their own without a server or text. Rounds of all sides alternate, so
that a disturbance of the machine hits all; figures are medians, after a warm-up of each case in each round.

--vllm and --llama-cpp name the virtual environments of those peers, made beside this project (docs/benchmarks.md).
--dtype is for all sides but llama.cpp. PEFT is left out where loading its adapters alone would take minutes: its cases
have at most 16 adapters.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.figures import summary
from benchmarks.common.options import circumstances, parser_of, store
from benchmarks.common.server_process import end_on_sigterm
from benchmarks.common.shapes import make_adapters, make_model
from benchmarks.common.sides import OurSide, Side, llama_cpp_side, peft_side, vllm_side
from benchmarks.common.tables import latency_tables, rate_table, serving_circumstances
from benchmarks.peers.pausing import paused
from benchmarks.workloads.cases import NEW_TOKENS, PROMPT_TOKENS, Case, adapters_of, chosen

MOST_PEFT_ADAPTERS = 16


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all sides and returns what was measured."""
    cases = chosen(arguments.cases, arguments.quick)
    names = adapters_of(cases)
    model_dir = make_model(arguments.shape, arguments.work)
    adapters = make_adapters(model_dir, names)
    adapters_dir = model_dir.parent / f"{model_dir.name}-adapters"
    at_once = max(case.at_once for case in cases)
    threads = arguments.threads
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(OurSide(model_dir, adapters, arguments.dtype, threads))
        dtype = ours.dtype
        sides: dict[str, Side] = {"graftwork": ours}
        if not arguments.no_peft:
            sides["peft"] = stack.enter_context(peft_side(model_dir, adapters_dir, dtype, threads))
        if arguments.llama_cpp:
            sides["llama_cpp"] = stack.enter_context(
                llama_cpp_side(arguments.llama_cpp, model_dir, adapters_dir, threads)
            )
        if arguments.vllm:
            sides["vllm"] = stack.enter_context(
                vllm_side(arguments.vllm, model_dir, adapters_dir, dtype, threads, names, at_once)
            )
        results = run_rounds(cases, sides, arguments.rounds)
    return {
        **circumstances("serving", arguments, dtype),
        "peers": {name: version for side in sides.values() for name, version in side.versions.items()},
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "hot_load_ms_median": statistics.median(ours.load_ms) if ours.load_ms else None,
        "results": results,
    }


def run_rounds(cases: list[Case], sides: dict[str, Side], rounds: int) -> list[dict[str, Any]]:
    """One row for each case, with the figures of all sides."""
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for round_number in range(rounds):
        for case in cases:
            for name, side in sides.items():
                if name == "peft" and case.adapters > MOST_PEFT_ADAPTERS:
                    continue
                with paused([other.process_id for other in sides.values() if other is not side]):
                    result = side.measure(case.job())
                measured.setdefault((case.name, name), []).append(result)
                rate = rate_tokens(case) / result["seconds"]
                print(f"round {round_number + 1}, {case.title}: {name} {rate:.1f} tok/s", flush=True)
    rows = []
    for case in cases:
        row = {"name": case.name, "case": case.title, "at_once": case.at_once, "requests": case.requests}
        row |= {"adapters": case.adapters, "prompt_tokens": case.prompt_tokens, "new_tokens": case.new_tokens}
        for name in sides:
            if (case.name, name) in measured:
                row |= summary(name, rate_tokens(case), measured[case.name, name])
        rows.append(row)
    return rows


def rate_tokens(case: Case) -> int:
    """What a rate counts: new tokens; where there is only one, the prompt's."""
    return case.requests * (case.new_tokens if case.new_tokens > 1 else case.prompt_tokens)


def main() -> None:
    """Measures, prints and stores."""
    parser = parser_of(__doc__, rounds=0, help_on_rounds="default: 3, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="few cases, two rounds: under three minutes without peers")
    parser.add_argument("--cases", default="", help="names from benchmarks/workloads/cases.py, separated by commas")
    parser.add_argument("--vllm", type=Path, help="environment of vLLM")
    parser.add_argument("--llama-cpp", type=Path, help="environment of llama-cpp-python, with gguf and torch")
    parser.add_argument("--no-peft", action="store_true", help="while developing: without transformers + PEFT")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 3)
    end_on_sigterm()
    measured = measure(arguments)
    print(f"\n{serving_circumstances(measured)}\n\nTokens per second:")
    print(f"\n{rate_table(measured)}\n\n{latency_tables(measured)}")
    store(measured, arguments.output)


if __name__ == "__main__":
    main()
