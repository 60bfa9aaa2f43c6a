"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Address: TypeAlias = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="The server. [env: GRAFTWORK_ADDRESS]", show_default=False),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help="base, an adapter id, or ID@VERSION.")]
AdapterRef: TypeAlias = Annotated[str, typer.Argument(metavar="ID[@VERSION]", help="The adapter.")]
JobId: TypeAlias = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
CacheSalt: TypeAlias = Annotated[
    str | None,
    typer.Option("--cache-salt", help="Share nothing in the server's cache with requests of another salt."),
]
Priority: TypeAlias = Annotated[int | None, typer.Option("--priority", help="-100 to 100; higher ones begin first.")]


def subgroup(help_text: str) -> typer.Typer:
    """A command group that looks and fails like the others."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help=help_text)
