"""Only the side that is measured runs: servers that wait for requests look for them all the time, at others' cost."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def paused(process_ids: Sequence[int]) -> Iterator[None]:
    """Within it, these processes and all their descendants stand still."""
    try:
        pause(process_ids, True)
        yield
    finally:
        pause(process_ids, False)


def pause(process_ids: Sequence[int], still: bool) -> None:
    """Makes these processes and all their descendants stand still, or go on; those that have ended are passed over."""
    for process_id in process_ids:
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(process_id)
            for process in [own, *own.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGSTOP if still else signal.SIGCONT)
