"""The front's threads for blocking work, by what it waits for, so that nothing quick waits behind something slow.

asyncio.to_thread    short reads of the database: every call needs them
FILES                uploads, publications, removals: what reads and writes whole files
HelperPool           one thread for each helper process (text/strangers/helper_pool.py)
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

FILES = ThreadPoolExecutor(8, "files")
"""Work on whole files, and writes to the database that follow it."""


async def run_to_end(work: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """The result of `work` on files, in a thread. It still ends before a caller that is cancelled meanwhile does.

    What follows there - removing a folder, releasing a lease - must not meet a thread that is still at it.
    """
    call = partial(contextvars.copy_context().run, work, *arguments, **keywords)
    running = asyncio.get_running_loop().run_in_executor(FILES, call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        running.exception()  # nobody is left to hear of it
        raise
