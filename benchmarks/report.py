"""The README's tables: `python -m benchmarks.report` writes them anew.

The README's block stands between two HTML comments and comes from benchmarks/results alone; a test compares the two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.common import tables

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- benchmarks: begin; written by python -m benchmarks.report -->", "<!-- benchmarks: end -->"

README_TABLES = {
    "front": (tables.front_table, tables.front_circumstances),
    "hot_load": (tables.hot_load_table, tables.hot_load_circumstances),
    "neighbours": (tables.neighbours_table, tables.neighbours_circumstances),
    "overload": (tables.overload_table, tables.overload_circumstances),
}
"""What stands in the README after the serving table, where it was measured."""


def readme_block() -> str:
    """What the README says about benchmarks, from benchmarks/results; what was not measured is not there."""
    serving = json.loads((RESULTS / "serving.json").read_text())
    parts = [BEGIN, tables.rate_table(serving), tables.serving_circumstances(serving)]
    for name, (table, circumstances) in README_TABLES.items():
        if (RESULTS / f"{name}.json").is_file():
            result = json.loads((RESULTS / f"{name}.json").read_text())
            parts += [table(result), circumstances(result)]
    return "\n\n".join([*parts, END])


def with_block(readme: str, block: str) -> str:
    """`readme` with `block` in place of the one it has. Raises ValueError if it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return before + block + after


def main() -> None:
    """Writes the README's block anew."""
    README.write_text(with_block(README.read_text(), readme_block()))
    sys.stdout.write("README.md: the benchmarks' block is written\n")


if __name__ == "__main__":
    main()
