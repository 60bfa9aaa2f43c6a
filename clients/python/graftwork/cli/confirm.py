"""Asking before something is done that cannot be undone."""

from __future__ import annotations

import sys
from typing import Annotated, TypeAlias

import typer

from graftwork.cli.session import FAILED

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
