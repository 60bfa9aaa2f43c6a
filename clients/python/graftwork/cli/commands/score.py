"""graftwork score: how likely a text is."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.cli import output
from graftwork.cli.options import Address, AsJson, Model, TokenIds, prompt_of
from graftwork.cli.session import session


def score(
    ctx: typer.Context,
    model: Model,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text to score.")] = None,
    token_ids: TokenIds = None,
    top_logprobs: Annotated[
        int, typer.Option("--top-logprobs", help="Show so many most likely tokens at each position, 0 to 20.")
    ] = 0,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Show the log probability of every token of a text."""
    given = prompt_of(text, token_ids, "TEXT")
    with session(ctx, address, as_json) as client:
        result = client.score(model, given, top_logprobs=top_logprobs)
        if as_json:
            output.emit(result)
            return
        output.logprobs(result.tokens)
        who = f"{result.model}@{result.version}" if result.version else result.model
        print(f"total {result.total_logprob:.6f} ({len(result.tokens)} tokens, {who})")
