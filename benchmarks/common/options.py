"""What the benchmarks' command lines share, and what their results begin with."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.common.machine import describe_machine


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """Options for a benchmark of the model on board."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    return parser


def parser_of(description: str | None, rounds: int, help_on_rounds: str | None = None) -> argparse.ArgumentParser:
    """Options for a benchmark that makes a model of a shape; `rounds` is the default."""
    parser = plain_parser(description)
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--rounds", type=int, default=rounds, help=help_on_rounds)
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    return parser


def server_options(arguments: argparse.Namespace, model_dir: Path, data_dir: str | Path) -> list[str]:
    """What a server is started with, by those options."""
    options = ["--model", str(model_dir), "--data-dir", str(data_dir), "--dtype", arguments.dtype]
    return [*options, "--threads", str(arguments.threads), "--log-level", "error"]


def circumstances(benchmark: str, arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """What every result begins with; `dtype` is the one that the server chose."""
    return {
        "benchmark": benchmark,
        "machine": describe_machine(),
        "shape": arguments.shape,
        "dtype": dtype,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }


def store(measured: dict[str, Any], output: Path | None) -> None:
    """Writes the result, if a file was named."""
    if output:
        output.write_text(json.dumps(measured, indent=1) + "\n")
