"""graftwork embed: the vectors of texts."""

from __future__ import annotations

from typing import Annotated, cast, get_args

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson, Model, Texts
from graftwork.cli.session import session
from graftwork.types import Pooling

_SHOWN_VALUES = 4


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
            rows.append(
                (output.shortened(text), one.input_tokens, len(one.values), result.pooling, f"[{values}{more}]")
            )
        output.table(("text", "tokens", "dimensions", "pooling", "values"), rows)
