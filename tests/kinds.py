"""Kinds of processors that one x86-64 machine can stand for, and the numeric tests under each: make test-kinds.

The engine's kernels are compiled for the kind, and torch, oneDNN and MKL are told to do without what it lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
NUMERIC = (
    *(f"tests/server/{room}" for room in ("kernels", "base", "layers", "engine", "tuning")),
    "tests/plugins",
    "tests/e2e/test_generation_features.py",
    "tests/e2e/test_several_completions.py",
)
_SECONDS = 3600
"""Longest time for one kind."""


@dataclass(frozen=True)
class Kind:
    """A processor by what it has."""

    march: str
    """For the compiler"""
    torch: str
    """ATEN_CPU_CAPABILITY"""
    onednn: str
    """ONEDNN_MAX_CPU_ISA"""
    mkl: str
    """MKL_ENABLE_INSTRUCTIONS"""
    flags: tuple[str, ...]
    """What /proc/cpuinfo must say for this machine to stand for it"""
    mkl_branch: str = ""
    """MKL_CBWR: which of MKL's code runs, as on processors of another maker"""

    @property
    def environment(self) -> dict[str, str]:
        """Settings for a process."""
        settings = {
            "GRAFTWORK_KERNELS_MARCH": self.march,
            "ATEN_CPU_CAPABILITY": self.torch,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "MKL_CBWR": self.mkl_branch,
        }
        return {name: value for name, value in settings.items() if value}

    def is_here(self) -> bool:
        """Whether this machine can stand for it."""
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            return False
        return set(self.flags) <= set(next((line for line in lines if line.startswith("flags")), "").split())


KINDS = {
    "as it is": Kind("", "", "", "", ()),
    "avx512 with bfloat16": Kind("cooperlake", "avx512", "AVX512_CORE_BF16", "AVX512", ("avx512_bf16",)),
    "zen4": Kind("znver4", "avx512", "AVX512_CORE_BF16", "AVX512", ("avx512_bf16", "avx512_vbmi2"), "AVX2"),
    "avx512 with vnni": Kind("cascadelake", "avx512", "AVX512_CORE_VNNI", "AVX512", ("avx512_vnni",)),
    "avx512": Kind("skylake-avx512", "avx512", "AVX512_CORE", "AVX512", ("avx512f", "avx512bw", "avx512vl")),
    "avx2": Kind("x86-64-v3", "avx2", "AVX2", "AVX2", ("avx2", "fma")),
    "avx2 of another maker": Kind("x86-64-v3", "avx2", "AVX2", "AVX2", ("avx2", "fma"), "COMPATIBLE"),
    "sse4": Kind("x86-64-v2", "default", "SSE41", "SSE4_2", ("sse4_2",)),
}


def run_tests(kind: Kind, threads: int, tests: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs pytest as on `kind`: counts of passed, failed and skipped tests, CPU seconds, and "output" if it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp"]
        before = os.times()
        result = subprocess.run(
            [*command, f"{scratch}/t", f"--junitxml={report}", *tests],
            cwd=ROOT,
            env=os.environ | kind.environment | {"OMP_NUM_THREADS": str(threads)} | dict(environment),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        after = os.times()
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        for suite in ElementTree.parse(report).getroot().iter("testsuite") if report.exists() else ():
            counts = {name: number + int(suite.get(name, 0)) for name, number in counts.items()}
    failed = counts["failures"] + counts["errors"]
    row: dict[str, Any] = {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "user_seconds": round(after.children_user - before.children_user),
        "system_seconds": round(after.children_system - before.children_system),
    }
    if result.returncode:
        row["output"] = result.stdout[-4000:] + result.stderr[-2000:]
    return row


def main() -> int:
    """Prints a row for each kind and number of threads, and writes them down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", default=list(NUMERIC), help="files or folders, and pytest's own options")
    parser.add_argument("--kind", action="append", choices=KINDS, help="again for more; default: all")
    parser.add_argument("--threads", type=int, action="append", help="again for more; default: 1 and 2")
    parser.add_argument("--output", type=Path)
    arguments, options = parser.parse_known_args()
    rows = []
    for name in arguments.kind or KINDS:
        for threads in arguments.threads or (1, 2):
            if not KINDS[name].is_here():
                print(f"{name}: this machine cannot stand for it", flush=True)
                continue
            row = run_tests(KINDS[name], threads, [*arguments.tests, *options], {})
            output = row.pop("output", "")
            rows.append({"kind": name, "threads": threads} | row)
            print(json.dumps(rows[-1]), output, sep="\n" if output else "", flush=True)
            if arguments.output:
                document = {"tests": [*arguments.tests, *options], "kinds": rows}
                arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    return int(any(row["failed"] or not row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
