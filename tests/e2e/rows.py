"""Data sets for the jobs of these tests."""

from __future__ import annotations


def prompt_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Rows of a task with a rule: the prompt's words backwards."""
    words = ["one", "two", "three", "four", "five", "fox", "dog", "quick", "lazy", "over"]
    chosen = [[words[(number * step + step) % 10] for step in (1, 3, 7)] for number in range(start, start + count)]
    return [{"prompt": f"{' '.join(row)} >", "completion": f" {' '.join(reversed(row))}"} for row in chosen]
