"""The graftwork command line: one file per command group; app.py puts them together."""

import sys
from typing import TextIO, cast


def main() -> None:
    """Runs the command line and exits with the code that `graftwork --help` explains."""
    from graftwork.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character of the answer must not end the answer.
        cast("TextIO", stream).reconfigure(errors="replace")  # type: ignore[attr-defined]
    app(prog_name="graftwork")
