"""From the command line to the server, in the same process and without a moment in which a signal is lost."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence


def hand_over(arguments: Sequence[str]) -> int:
    """Becomes `python -m graftwork_server ...`, so that signals and exit codes are the server's.

    Returns only where the server is not installed: an exit code.
    """
    # They wait, over exec too, until the server says what they do.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    if importlib.util.find_spec("graftwork_server") is None or importlib.util.find_spec("torch") is None:
        print('error: the server is not installed; install it with: pip install "graftwork[server]"', file=sys.stderr)
        return 1
    sys.stdout.flush()
    # gRPC's core writes a line of its own to stderr when a port is taken; the server says it in one plain line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # -P: a file in the working directory that happens to be called like a module must not be imported in its place.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "graftwork_server", *arguments])
