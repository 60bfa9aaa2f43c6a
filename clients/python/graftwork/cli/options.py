"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
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
MaxTokens: TypeAlias = Annotated[int | None, typer.Option("--max-tokens", help="Most tokens to generate.")]
Temperature: TypeAlias = Annotated[
    float | None, typer.Option("--temperature", help="0 (the default) takes the most likely token.")
]
TopP: TypeAlias = Annotated[float | None, typer.Option("--top-p", help="Nucleus mass in (0, 1].")]
TopK: TypeAlias = Annotated[int | None, typer.Option("--top-k", help="Sample among so many tokens.")]
Seed: TypeAlias = Annotated[int | None, typer.Option("--seed", help="Seed of this request.")]
Stop: TypeAlias = Annotated[
    list[str] | None, typer.Option("--stop", help="Text that ends the generation; may be repeated.")
]
MinP: TypeAlias = Annotated[
    float | None, typer.Option("--min-p", help="Sample only tokens this share as likely as the most likely one.")
]
RepetitionPenalty: TypeAlias = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1: tokens that were there become less likely.")
]
PresencePenalty: TypeAlias = Annotated[
    float | None, typer.Option("--presence-penalty", help="Taken from each token that the completion has.")
]
FrequencyPenalty: TypeAlias = Annotated[
    float | None, typer.Option("--frequency-penalty", help="The same, for each time that it has it.")
]
MinTokens: TypeAlias = Annotated[int | None, typer.Option("--min-tokens", help="Tokens before any end.")]
JsonSchema: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--json-schema",
        metavar="FILE",
        help="A JSON schema that the output must follow.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]
Regex: TypeAlias = Annotated[str | None, typer.Option("--regex", help="Pattern that the whole output must match.")]
Choice: TypeAlias = Annotated[
    list[str] | None, typer.Option("--choice", help="A text to choose from; may be repeated.")
]

CacheSalt: TypeAlias = Annotated[
    str | None,
    typer.Option("--cache-salt", help="Share nothing in the server's cache with requests of another salt."),
]
Priority: TypeAlias = Annotated[int | None, typer.Option("--priority", help="-100 to 100; higher ones begin first.")]


def subgroup(help_text: str) -> typer.Typer:
    """A command group that looks and fails like the others."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help=help_text)
