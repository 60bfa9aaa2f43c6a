"""Only the side that is measured runs: servers that wait for requests look for them all the time, at others' cost."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def paused(process_ids: Iterable[int]) -> Iterator[None]:
    """Within it, these processes and all their descendants stand still."""
    stopped = [process for process_id in process_ids for process in _family(process_id)]
    try:
        _send(stopped, signal.SIGSTOP)
        yield
    finally:
        _send(stopped, signal.SIGCONT)


def _family(process_id: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(process_id)
        return [process, *process.children(recursive=True)]
    return []


def _send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
