"""`python -m graftwork_server ...` is `graftwork serve ...`; see front/serve.py.

Imports take seconds, so what signals do is settled before them.
"""

from __future__ import annotations

import os
import sys

from graftwork_server.process import signals


def main() -> int:
    """Runs the server until a signal ends it; returns the exit code."""
    signals.end_at_once()
    os.umask(0o077)  # what server, engine and tuners write is for this user alone
    from graftwork_server.front import serve

    return serve.main()


if __name__ == "__main__":
    sys.exit(main())
