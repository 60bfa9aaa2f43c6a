"""graftwork serve: hands over to the server."""

from __future__ import annotations

import typer

from graftwork.cli.hand_over import hand_over


def serve(ctx: typer.Context) -> None:
    """Start a server. graftwork serve --help shows its options."""
    raise typer.Exit(hand_over(ctx.args))
