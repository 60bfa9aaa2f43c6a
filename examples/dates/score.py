"""Exact-match scoring of the demo task.

    python examples/dates/score.py predictions.jsonl heldout.jsonl

Each line of the predictions is an object with a ``prediction`` (or a ``completion``, or a ``text``), in the order of
the reference rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions equal to their reference, blanks around either left out."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not references:
        raise ValueError("there is nothing to score")
    hits = sum(made.strip() == wanted.strip() for made, wanted in zip(predictions, references, strict=True))
    return hits / len(references)


def read_texts(path: Path, fields: Sequence[str]) -> list[str]:
    """The first of the fields that each line has."""
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        field = next((name for name in fields if name in row), None)
        if field is None:
            raise ValueError(f"{path}:{number}: none of {', '.join(fields)} is there")
        texts.append(row[field])
    return texts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("predictions", type=Path)
    parser.add_argument("references", type=Path)
    args = parser.parse_args()
    predictions = read_texts(args.predictions, ("prediction", "completion", "text"))
    references = read_texts(args.references, ("completion",))
    score = exact_match(predictions, references)
    print(json.dumps({"exact_match": score, "rows": len(references)}))


if __name__ == "__main__":
    main()
