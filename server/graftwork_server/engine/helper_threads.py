"""Threads beside the step loop keep off its OpenMP threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

import torch


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
