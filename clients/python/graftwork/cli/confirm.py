"""Asking before something is done that cannot be undone."""

from __future__ import annotations

import sys
from typing import Annotated, Protocol, TypeAlias

import typer

from graftwork.cli.exit_codes import FAILED

Yes: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")]


def confirm(question: str, yes: bool) -> None:
    """Asks on a terminal, and ends the command with code 1 unless the answer is y or yes.

    Does not ask with `yes`, nor where stdin is no terminal: nobody is there to answer. The question goes to stderr, so
    that stdout holds results alone. Call it inside of session(), where Ctrl-C has its exit code.
    """
    if yes or not sys.stdin.isatty():
        return
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        print("nothing was done", file=sys.stderr)
        raise typer.Exit(FAILED)


class Deletable(Protocol):
    """What client.datasets and client.tuning have in common."""

    def get(self, resource_id: str, /) -> object:
        """Raises NotFoundError."""

    def delete(self, resource_id: str, /) -> None:
        """Deletes it for good."""


def delete_by_id(resources: Deletable, resource_id: str, question: str, yes: bool) -> None:
    """Deletes what has an id, once the question is answered. Raises NotFoundError for a mistyped id, before it asks."""
    resources.get(resource_id)
    confirm(question, yes)
    resources.delete(resource_id)
