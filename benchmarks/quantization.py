"""What quantising the base costs and saves: products, whole servers, weights and answers, both sides in one run.

    python -m benchmarks.quantization [--shape 135m] [--rounds 3] [--output benchmarks/results/quantization.json]

Products: one linear layer, time of torch's in the data type, of what is served here, and of what else there is, over
so many copies of the weight that no cache holds them, as in a decode step. Servers: one each for none, int8 and nf4,
the same requests over gRPC (64 prompt and 32 new tokens, greedy), rounds of all three alternating, medians. Answers:
the on-board model's mean loss over this repository's README, in pieces of 512 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.options import circumstances, parser_of, store
from benchmarks.common.shapes import make_adapters, make_model
from benchmarks.common.sides import OurSide
from benchmarks.common.tables import markdown
from benchmarks.workloads.cases import NEW_TOKENS, PROMPT_TOKENS, Case, adapters_of
from graftwork_server.base.device import choose_dtype
from graftwork_server.base.quantization import Int8Linear, Nf4Linear, bitsandbytes, rows_to_int8
from graftwork_server.base.weights import map_base_model
from graftwork_server.config import DEMO_MODEL
from graftwork_server.kernels.native import native_kernels
from graftwork_server.layers.models.causal import load_base
from graftwork_server.text import TextProcessor

CPU = torch.device("cpu")
KINDS = ("none", "int8", "nf4")
LAYERS = ((576, 1536), (1536, 576), (576, 49152))
ROWS = (1, 16, 64, 1024)
CASES = (
    Case("single", "1 request", 1, 0),
    Case("base-16", "16 requests", 16, 0),
    Case("16-16", "16 requests, 16 adapters", 16, 16),
)
COLD_BYTES = 64 << 20


def milliseconds(work: Callable[[int], object], copies: int) -> float:
    """Median time of one call, the copies taken in turn."""

    def round_trip() -> float:
        started = time.perf_counter()
        for index in range(copies):
            work(index)
        return (time.perf_counter() - started) / copies * 1000

    round_trip()
    count = max(3, min(30, round(0.05 / (round_trip() * copies / 1000))))
    return statistics.median(round_trip() for _ in range(count))


@torch.inference_mode()
def products(dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row for each layer and number of rows: ms by way of computing it."""
    results = []
    for in_features, out_features in LAYERS:
        copies = max(1, COLD_BYTES // (in_features * out_features))
        weights = [torch.randn(out_features, in_features).mul_(0.02) for _ in range(copies)]
        ways = _ways_served(weights, dtype) | _other_ways(weights, dtype)
        for rows in ROWS:
            if rows * out_features > 8_000_000:
                continue  # no step makes so many logits
            x = torch.randn(rows, in_features).to(dtype)
            times = {name: milliseconds(partial(way, x), copies) for name, way in ways.items()}
            results.append({"in_features": in_features, "out_features": out_features, "rows": rows, "ms": times})
            print(f"{rows} x {in_features} x {out_features}:", {n: round(t, 3) for n, t in times.items()}, flush=True)
    return results


Way = Callable[[torch.Tensor, int], object]
"""Multiplies x by the weight of that index."""


def _ways_served(weights: list[torch.Tensor], dtype: torch.dtype) -> dict[str, Way]:
    """torch's product in the data type, and the layers of the engine."""
    kernels = native_kernels(CPU, dtype)
    sizes = (weights[0].shape[1], weights[0].shape[0])
    plain = [weight.to(dtype) for weight in weights]
    int8 = [Int8Linear(sizes, Int8Linear.quantize(weight), None) for weight in weights]
    nf4 = [Nf4Linear(sizes, Nf4Linear.quantize(weight), None) for weight in weights]
    return {
        "torch, not quantised": lambda x, i: torch.nn.functional.linear(x, plain[i]),
        "int8 here": lambda x, i: int8[i].product(x, kernels),
        "int8 here, without the kernel": lambda x, i: int8[i].product(x),
        "nf4 here": lambda x, i: nf4[i].product(x, kernels),
    }


def _other_ways(weights: list[torch.Tensor], dtype: torch.dtype) -> dict[str, Way]:
    """torch._int_mm alone, torch's dynamic linear (fbgemm or oneDNN; one scale for all rows, so that an answer depends
    on the batch), bitsandbytes' two layers."""
    library = bitsandbytes()
    codes = [rows_to_int8(weight)[0] for weight in weights]
    scales = [rows_to_int8(weight)[1].view(-1) for weight in weights]
    zeros = torch.zeros(len(weights[0]), dtype=torch.int64)
    dynamic = [
        torch.ops.quantized.linear_prepack(
            torch.quantize_per_channel(weight, scale.double(), zeros, 0, torch.qint8), None
        )
        for weight, scale in zip(weights, scales, strict=True)
    ]
    llm_int8 = []
    for weight in weights:
        layer = library.nn.Linear8bitLt(*weight.t().shape, bias=False, has_fp16_weights=False)
        layer.weight = library.nn.Int8Params(weight.to(dtype), requires_grad=False, has_fp16_weights=False)
        llm_int8.append(layer.to("cpu").eval())
    packed = []
    for weight in weights:
        quantised, state = library.functional.quantize_4bit(weight.to(dtype), blocksize=64, quant_type="nf4")
        packed.append(library.functional._convert_weight_packed_for_cpu(quantised, copy.deepcopy(state)))
    return {
        "torch._int_mm, product alone": lambda x, i: torch._int_mm(x.to(torch.int8), codes[i].t()),
        "torch dynamic linear, one scale": lambda x, i: torch.ops.quantized.linear_dynamic(x.float(), dynamic[i], True),
        "torch._weight_int8pack_mm": lambda x, i: torch._weight_int8pack_mm(x, codes[i], scales[i].to(x.dtype)),
        "bitsandbytes int8": lambda x, i: llm_int8[i](x),
        "bitsandbytes nf4, packed": lambda x, i: library.functional.gemv_4bit(x, packed[i][0], state=packed[i][1]),
    }


def bases(model_dir: Path, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """By kind: bytes of the weights of `model_dir`, and the on-board model's mean loss over the README."""
    found = {}
    for kind in KINDS:
        weight_bytes = load_base(str(model_dir), CPU, dtype, model_dir, quantization=kind).info.weight_bytes
        on_board = load_base(str(DEMO_MODEL), CPU, dtype, DEMO_MODEL, quantization=kind)
        found[kind] = {"weight_bytes": weight_bytes, "on_board_readme_loss": _readme_loss(on_board.weights.info())}
        print(kind, found[kind], flush=True)
    return found


@torch.inference_mode()
def _readme_loss(info: Any) -> float:
    model: Any = map_base_model(info)
    model.set_attn_implementation("sdpa")
    text = TextProcessor.from_dir(str(DEMO_MODEL))
    ids = torch.tensor(text.encode((Path(__file__).parent.parent / "README.md").read_text()))
    pieces = [piece for piece in ids.split(512) if len(piece) > 1]
    logits = [model(input_ids=piece[None], use_cache=False).logits[0, :-1].float() for piece in pieces]
    targets = torch.cat([piece[1:] for piece in pieces])
    return torch.nn.functional.cross_entropy(torch.cat(logits), targets).item()


def servers(arguments: argparse.Namespace, model_dir: Path) -> dict[str, dict[str, list[float]]]:
    """By kind and case: tokens per second of each round."""
    adapters = make_adapters(model_dir, adapters_of(CASES))
    measured: dict[str, dict[str, list[float]]] = {kind: {case.title: [] for case in CASES} for kind in KINDS}
    with contextlib.ExitStack() as stack:
        sides = {}
        for kind in KINDS:
            options = ("--quantization", kind)
            side = OurSide(model_dir, adapters, arguments.dtype, arguments.threads, *options)
            sides[kind] = stack.enter_context(side)
        for round_number in range(arguments.rounds):
            for case in CASES:
                for kind, side in sides.items():
                    seconds = side.measure(case.job())["seconds"]
                    measured[kind][case.title].append(case.requests * case.new_tokens / seconds)
                rates = {kind: round(measured[kind][case.title][-1], 1) for kind in KINDS}
                print(f"round {round_number + 1}, {case.title}: {rates}", flush=True)
    return measured


def table(result: dict[str, Any]) -> str:
    """The servers' part as Markdown."""
    machine, kinds = result["machine"], result["servers"]
    sentence = (
        f"{result['shape']} Llama shape, {result['dtype']}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {result['threads']} "
        f"threads; {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}; medians of "
        f"{result['rounds']} rounds in one run."
    )
    rows = [
        [case.title, *(f"{statistics.median(kinds[kind][case.title]):.1f} tok/s" for kind in KINDS)] for case in CASES
    ]
    bases = [result["bases"][kind] for kind in KINDS]
    rows.append(["weights", *(f"{base['weight_bytes'] / 1e6:.0f} MB" for base in bases)])
    rows.append(["loss of the on-board model", *(f"{base['on_board_readme_loss']:.4f}" for base in bases)])
    return f"{sentence}\n\n{markdown(['', *KINDS], rows)}"


def main() -> None:
    """Measures, prints and stores."""
    arguments = parser_of(__doc__, rounds=3).parse_args()
    logging.disable(logging.WARNING)  # bitsandbytes tells of every cast
    torch.set_num_threads(arguments.threads)
    dtype = choose_dtype(arguments.dtype, CPU)
    model_dir = make_model(arguments.shape, arguments.work)
    result = {
        **circumstances("quantization", arguments, str(dtype).removeprefix("torch.")),
        "servers": servers(arguments, model_dir),
        "bases": bases(model_dir, dtype),
        "products": products(dtype),
    }
    print("\n" + table(result))
    store(result, arguments.output)


if __name__ == "__main__":
    main()
