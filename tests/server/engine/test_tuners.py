"""The engine's side of tuners: what is wrong with one ends its job and is said."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
from typing import Any

import pytest
from tests.server.scripted_engine import OPTIONS, model_info

from graftwork_server.engine.tuners import Tuners
from graftwork_server.errors import InvalidArgument
from graftwork_server.wire.frames import encode_frame
from graftwork_server.wire.tuning import Failed, JobEvent, Note, SharedWeightsInfo, TunerTask

GARBAGE = b"\0\0\0\1\xc1"


@pytest.fixture
def told() -> queue.Queue[JobEvent]:
    return queue.Queue()


@pytest.fixture
def tuners(told: queue.Queue[JobEvent]) -> Tuners:
    weights = SharedWeightsInfo(device="cpu", size_bytes=0, layout=[])
    return Tuners(weights, model_info(OPTIONS), threads=1, yield_ms=0, send=told.put)


def job(**config: Any) -> TunerTask:
    return TunerTask(job_id="j", strategy="lora", config=config, dataset_path="", job_dir="", artifact_dir="")


def test_a_job_that_cannot_be_sent_is_refused_and_leaves_no_process(tuners: Tuners) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InvalidArgument, match="StartTuning"):
        tuners.start(job(note="\ud800"))
    assert len(os.listdir("/proc/self/fd")) == before
    assert not tuners.stop("j"), "it may be started again"


@pytest.mark.parametrize("broken", ["a message that is none", "no process to be had"])
def test_a_broken_tuner_fails_its_job(
    tuners: Tuners, told: queue.Queue[JobEvent], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    spawned: list[subprocess.Popen[bytes]] = []

    def spawn(spec: TunerTask) -> tuple[subprocess.Popen[bytes], socket.socket]:
        if spawned:
            raise BlockingIOError("no process to be had")
        ours, theirs = socket.socketpair()
        spawned.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        with theirs:
            theirs.sendall(encode_frame(Note(text="hello")) + (GARBAGE if broken.startswith("a message") else b""))
        if broken.startswith("no"):
            spawned[0].kill()
        return spawned[0], ours

    monkeypatch.setattr(tuners, "_spawn", spawn)
    tuners.start(job())
    assert told.get(timeout=60).event == Note(text="hello")
    event = told.get(timeout=60).event
    assert isinstance(event, Failed)
    assert event.error.code == "INTERNAL"
    assert spawned[0].wait(60) is not None
    assert not tuners.stop("j"), "it is forgotten, so that it can be started again"
