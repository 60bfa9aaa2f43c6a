"""graftwork serve: hands over to the server."""

from __future__ import annotations

import importlib.util
import os
import sys

import typer


def serve(ctx: typer.Context) -> None:
    """Start a server. graftwork serve --help shows its options."""
    if importlib.util.find_spec("graftwork_server") is None or importlib.util.find_spec("torch") is None:
        print('error: the server is not installed; install it with: pip install "graftwork[server]"', file=sys.stderr)
        raise typer.Exit(1)
    sys.stdout.flush()
    # gRPC's core writes a line of its own to stderr when a port is taken; the server says it in one plain line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Replaces this process, so that signals and exit codes are the server's. -P: a file in the working directory that
    # happens to be called like a module must not be imported in its place.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "graftwork_server", *ctx.args])
