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
TokenIds: TypeAlias = Annotated[
    str | None, typer.Option("--token-ids", metavar="1,2,3", help="Token ids instead of a prompt, taken as they are.")
]
Texts: TypeAlias = Annotated[list[str], typer.Argument(metavar="TEXT", help="The texts.")]
Priority: TypeAlias = Annotated[int | None, typer.Option("--priority", help="-100 to 100; higher ones begin first.")]


def subgroup(help_text: str) -> typer.Typer:
    """A command group that looks and fails like the others."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help=help_text)


def prompt_of(prompt: str | None, token_ids: str | None, argument: str) -> str | list[int]:
    """The prompt that a command was given, by its argument or by --token-ids. Raises BadParameter for both or none."""
    if (prompt is None) == (token_ids is None):
        raise typer.BadParameter(f"give either {argument} or --token-ids")
    if token_ids is None:
        assert prompt is not None
        return prompt
    try:
        return [int(part) for part in token_ids.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{token_ids!r} is not a list of token ids such as 1,2,3") from None
