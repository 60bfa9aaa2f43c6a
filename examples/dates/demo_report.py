"""What the demo found: the table, the bounds, and the same as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

BASE_AT_MOST, TUNED_AT_LEAST = 0.20, 0.90


@dataclass(frozen=True)
class Row:
    """One line of the table; None where there is nothing to measure."""

    model: str
    exact_match: float
    trained_parameters: int
    minutes: float | None
    """From asking for the tuning to the published version."""
    peak_memory_bytes: int
    """Of the tuner process; for the base, of the server's processes while they answered."""
    artifact_bytes: int
    hot_load_ms: float | None


def broken_bounds(rows: Sequence[Row]) -> list[str]:
    """A sentence for each score that is not where it must be."""
    return [
        f"{row.model} reaches {row.exact_match:.0%} exact match; {bound} was expected."
        for row in rows
        for bound, kept in [
            (f"at most {BASE_AT_MOST:.0%}", row.exact_match <= BASE_AT_MOST)
            if row.model == "base"
            else (f"at least {TUNED_AT_LEAST:.0%}", row.exact_match >= TUNED_AT_LEAST)
        ]
        if not kept
    ]


def show_table(rows: Sequence[Row], heldout: int) -> None:
    """The comparison."""
    table = Table(title=f"Written dates to ISO 8601, {heldout} held-out rows")
    table.add_column("model")
    for heading in ("exact match", "trained parameters", "minutes", "peak memory", "artifact", "hot load"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.exact_match:.0%}",
            f"{row.trained_parameters:,}",
            "-" if row.minutes is None else f"{row.minutes:.1f}",
            megabytes(row.peak_memory_bytes),
            megabytes(row.artifact_bytes),
            "-" if row.hot_load_ms is None else f"{row.hot_load_ms:.0f} ms",
        )
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    console.print(
        "peak memory: the tuner's own process, beside the server; in the row of the base, the server while it answered",
        style="dim",
    )


def megabytes(count: int) -> str:
    """1.3 MB, 512 MB."""
    value = count / 1e6
    return f"{value:.1f} MB" if value < 100 else f"{value:.0f} MB"


def write_results(path: Path, rows: Sequence[Row], **more: Any) -> None:
    """Rows, machine and versions, and whatever else was found out."""
    document = {
        "rows": [asdict(row) for row in rows],
        **more,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": _cores(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("graftwork", "torch", "transformers", "peft", "grpcio")},
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
