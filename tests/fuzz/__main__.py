"""python -m tests.fuzz [--messages 100000] [--files 10000] [--only messages:17] [--output FILE.json]

Starts a server with a toy model and sends it mutated messages over every method, then mutated files. What must hold:
every call gets a status in time, none of them INTERNAL, UNKNOWN or UNAVAILABLE; every refusal has a reason; front and
engine are the same processes at the end; nothing in the log is a traceback; the front's memory is bounded. Ends with 1
if anything did not. The case of a number is the same for the same seed: --only runs the one that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.common.machine import describe_machine
from tests.fuzz.run import Findings, Fuzzer


def main() -> int:
    """Runs the fuzzer; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of messages at most, and of files")
    parser.add_argument("--only", help="one case: messages:NUMBER or files:NUMBER")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    messages: range | list[int] = range(arguments.messages)
    files: range | list[int] = range(arguments.files)
    if arguments.only:
        kind, _, number = arguments.only.rpartition(":")
        messages, files = ([int(number)], []) if kind.endswith("messages") else ([], [int(number)])
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="graftwork-fuzz-") as scratch:
        fuzzer = Fuzzer(Path(scratch), arguments.seed)
        try:
            asyncio.run(fuzzer.run(messages, files, arguments.seconds))
        finally:
            fuzzer.close()
    report = {
        "seed": arguments.seed,
        "messages": fuzzer.findings.messages,
        "files": fuzzer.findings.files,
        "seconds": round(time.monotonic() - begun, 1),
        **figures(fuzzer.findings),
        "machine": describe_machine(),
    }
    text = json.dumps(report, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)
    return 1 if fuzzer.findings.failures else 0


def figures(findings: Findings) -> dict[str, Any]:
    """What was found, for the report."""
    by_method: dict[str, dict[str, int]] = defaultdict(dict)
    for (method, status), count in sorted(findings.statuses.items()):
        by_method[method][status] = count
    return {
        "calls": findings.calls,
        "made_by_client": findings.made_by_client,
        "failures": findings.failures,
        "front_start_mib": findings.front_bytes >> 20,
        "front_peak_mib": findings.front_peak_bytes >> 20,
        "all_peak_mib": findings.all_peak_bytes >> 20,
        "statuses": by_method,
    }


if __name__ == "__main__":
    sys.exit(main())
