"""The processes that a test's server has started. No test of itself."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from graftwork_server.text.strangers.helper import MODULE


def helpers(base_dir: Path | None = None) -> list[psutil.Process]:
    """The helper processes of this process, those with that base only if one is given: other modules may have some."""
    wanted = {MODULE, str(base_dir)} if base_dir else {MODULE}
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and wanted <= set(child.cmdline()):
                found.append(child)
    return found
