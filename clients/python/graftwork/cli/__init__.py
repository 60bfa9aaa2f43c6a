"""The graftwork command line: commands/ has a file for each command, app.py puts them together."""

import os
import signal
import sys

from graftwork.cli.exit_codes import INTERRUPTED


def main() -> None:
    """Runs the command line and exits with the code that `graftwork --help` explains."""
    # Imports take a while, and who presses Ctrl-C meanwhile wants no traceback. session() makes it an exception again.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    if sys.argv[1:2] == ["serve"]:
        from graftwork.cli.hand_over import hand_over

        sys.exit(hand_over(sys.argv[2:]))
    from graftwork.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character of the answer must not end the answer.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    app(prog_name="graftwork")
