"""graftwork classify: the labels of texts."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson, Model, Texts
from graftwork.cli.session import session

Pair = Annotated[
    str | None, typer.Option("--pair", metavar="TEXT", help="A second text that each is joined to, as a pair.")
]


def classify(
    ctx: typer.Context, model: Model, texts: Texts, pair: Pair = None, as_json: AsJson = False, address: Address = None
) -> None:
    """Label texts with the head of an adapter or of the base model."""
    with session(ctx, address, as_json) as client:
        result = client.classify(model, texts if pair is None else [(text, pair) for text in texts])
        if as_json:
            output.emit(result)
            return
        rows = []
        for text, one in zip(texts, result.results, strict=True):
            scores = [
                f"{score.label} {score.logit if score.probability is None else score.probability:.4f}"
                for score in one.labels
            ]
            rows.append((output.shortened(text), one.predicted_label, ", ".join(scores)))
        output.table(("text", "label", "values" if result.problem_type == "regression" else "probabilities"), rows)
