"""graftwork classify and graftwork embed."""

from __future__ import annotations

from typing import Annotated, cast, get_args

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson, Model
from graftwork.cli.session import session
from graftwork.requests.pooling import TextInput
from graftwork.types import Pooling

Texts = Annotated[list[str], typer.Argument(metavar="TEXT", help="The texts.")]
Pair = Annotated[
    str | None, typer.Option("--pair", metavar="TEXT", help="A second text that each is joined to, as a pair.")
]

_SHOWN = 60
"""Characters of a text that a table has."""
_SHOWN_VALUES = 4


def classify(
    ctx: typer.Context, model: Model, texts: Texts, pair: Pair = None, as_json: AsJson = False, address: Address = None
) -> None:
    """Label texts with the head of an adapter or of the base model."""
    with session(ctx, address, as_json) as client:
        result = client.classify(model, _inputs(texts, pair))
        if as_json:
            output.emit(result)
            return
        rows = []
        for text, one in zip(texts, result.results, strict=True):
            scores = [
                f"{score.label} {score.logit if score.probability is None else score.probability:.4f}"
                for score in one.labels
            ]
            rows.append((_short(text), one.predicted_label, ", ".join(scores)))
        output.table(("text", "label", "values" if result.problem_type == "regression" else "probabilities"), rows)


def embed(
    ctx: typer.Context,
    model: Model,
    texts: Texts,
    pooling: Annotated[
        str | None,
        typer.Option("--pooling", metavar="|".join(get_args(Pooling)), help="Which hidden state stands for a text."),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize/--no-normalize", help="Scale vectors to length 1.")] = True,
    dimensions: Annotated[int | None, typer.Option("--dimensions", help="Keep so many first values.")] = None,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Turn texts into vectors; --json prints them whole."""
    if pooling not in (None, *get_args(Pooling)):
        raise typer.BadParameter(f"--pooling is {pooling!r}; {', '.join(get_args(Pooling))} are accepted")
    with session(ctx, address, as_json) as client:
        result = client.embed(
            model, texts, pooling=cast("Pooling | None", pooling), normalize=normalize, dimensions=dimensions
        )
        if as_json:
            output.emit(result)
            return
        rows = []
        for text, one in zip(texts, result.embeddings, strict=True):
            values = ", ".join(f"{value:.4f}" for value in one.values[:_SHOWN_VALUES])
            more = ", ..." if len(one.values) > _SHOWN_VALUES else ""
            rows.append((_short(text), one.input_tokens, len(one.values), result.pooling, f"[{values}{more}]"))
        output.table(("text", "tokens", "dimensions", "pooling", "values"), rows)


def _inputs(texts: list[str], pair: str | None) -> list[TextInput]:
    return [text if pair is None else (text, pair) for text in texts]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
