"""Threads beside the step loop keep off its OpenMP threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from graftwork_server.process.last_words import exit_after


class HelperThreads:
    """Threads for work beside the step loop, which answers by itself. Work that raises instead has a defect, and nobody
    would ever hear of it: the process ends."""

    def __init__(self, count: int, name: str, first: Callable[[], None]) -> None:
        """`first` is called first in each thread."""
        self._threads = ThreadPoolExecutor(count, name, first)

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Runs `work` in one of the threads, when one is free."""
        self._threads.submit(_run, work, *arguments)


def _run(work: Callable[..., None], *arguments: Any) -> None:
    try:
        work(*arguments)
    except BaseException as error:
        exit_after(error)


def compute_alone() -> None:
    """Lets the calling thread compute without threads of its own; call it first in each thread beside the step loop.

    OpenMP gives every thread that computes in parallel a team, and its threads stay. Where all teams together have more
    threads than there are cores, GNU's library lets nobody wait actively any more (its throttled spin count), and a
    decode step, which waits some hundred times for a few microseconds, takes twice as long. torch.set_num_threads would
    also change what MKL does in all other threads.
    """
    torch.get_num_threads()  # torch sets a thread's number when it first asks for it, and would do so after us
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)


def compute_behind() -> None:
    """As compute_alone, and only in time that the step loop leaves. The threads of a step wait for each other hundreds
    of times; one that shares its core with another for a time slice holds up all."""
    compute_alone()
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # on Linux, a thread has a priority of its own
