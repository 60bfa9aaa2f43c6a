"""From what was measured to one figure: percentiles, and medians over rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 1).__int__() - 1)]


def summary(side: str, tokens: int, rounds: Sequence[dict[str, Any]]) -> Row:
    """A side's figures for one case: medians over rounds of its rate, and of each round's latency percentiles.

    tokens: those that the rate counts. Keys begin with the side's name; rates are tokens per second.
    """
    rates = [tokens / measured["seconds"] for measured in rounds]
    row: Row = {f"{side}_tokens_per_second": statistics.median(rates), f"{side}_rounds": rates}
    for key, field, share in (
        ("first_token_ms", "first_ms", 0.5),
        ("first_token_p99_ms", "first_ms", 0.99),
        ("inter_token_ms", "gaps_ms", 0.5),
        ("inter_token_p99_ms", "gaps_ms", 0.99),
    ):
        values = [percentile(measured[field], share) for measured in rounds if measured[field]]
        if values:
            row[f"{side}_{key}"] = statistics.median(values)
    return row


def medians(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    """A row for each case: the median of every figure over the case's rounds, and the rounds."""
    return [
        {"case": name, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}, "rounds": rows}
        for name, rows in rounds.items()
    ]


def show(name: str, row: Mapping[str, float]) -> None:
    """One round of one case, on a line."""
    print(name, {key: round(value, 1) for key, value in row.items()}, flush=True)
