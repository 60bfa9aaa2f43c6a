"""Write the demo task: turn a written date into ISO 8601.

    python examples/dates/make_data.py --out /tmp/dates

The data is synthetic: this script makes up every row from a seed. It writes ``train.jsonl``, ``validation.jsonl`` and
``heldout.jsonl`` with one ``{"prompt": ..., "completion": ...}`` object a line. No calendar day is in two of the
files, so the held-out score cannot come from remembering.
"""

from __future__ import annotations

import argparse
import json
import random
from calendar import day_name, month_name
from datetime import date, timedelta
from pathlib import Path

FIRST, LAST = date(1900, 1, 1), date(2059, 12, 31)
MONTHS = list(month_name)[1:]
WEEKDAYS = list(day_name)


def ordinal(day: int) -> str:
    """1st, 2nd, 3rd, 4th ... 31st."""
    ending = "th" if 11 <= day % 100 <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def write(day: date, style: int) -> str:
    """One day in one of the written styles. Numbers alone always stand in the order day, month, year."""
    month, weekday = MONTHS[day.month - 1], WEEKDAYS[day.weekday()]
    return (
        f"{month} {day.day}, {day.year}",
        f"{day.day} {month} {day.year}",
        f"{ordinal(day.day)} of {month}, {day.year}",
        f"the {ordinal(day.day)} of {month} {day.year}",
        f"{month} {ordinal(day.day)}, {day.year}",
        f"{month[:3]} {day.day} {day.year}",
        f"{day.day}-{month[:3]}-{day.year}",
        f"{weekday}, {day.day} {month} {day.year}",
        f"{weekday[:3]} {day.day} {month[:3]} {day.year}",
        f"{weekday}, {month} {day.day}, {day.year}",
        f"{day.day:02d}.{day.month:02d}.{day.year}",
        f"{day.day}/{day.month}/{day.year}",
    )[style]


STYLES = 12


def make_rows(days: list[date], rng: random.Random) -> list[dict[str, str]]:
    """One row a day, every style as often as any other."""
    styles = [number % STYLES for number in range(len(days))]
    rng.shuffle(styles)
    return [
        {"prompt": f"Date: {write(day, style)}\nISO:", "completion": f" {day.isoformat()}"}
        for day, style in zip(days, styles, strict=True)
    ]


def make_splits(seed: int, train: int, validation: int, heldout: int) -> dict[str, list[dict[str, str]]]:
    """The three splits, over disjoint days."""
    rng = random.Random(seed)
    span = (LAST - FIRST).days + 1
    numbers = rng.sample(range(span), train + validation + heldout)
    days = [FIRST + timedelta(days=number) for number in numbers]
    return {
        "heldout": make_rows(days[:heldout], rng),
        "validation": make_rows(days[heldout : heldout + validation], rng),
        "train": make_rows(days[heldout + validation :], rng),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder of the three files")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--train", type=int, default=2000, help="rows to train on")
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--heldout", type=int, default=100)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_splits(args.seed, args.train, args.validation, args.heldout).items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
