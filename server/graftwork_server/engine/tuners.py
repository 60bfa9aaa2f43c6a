"""Tuner processes of this engine: spawned with the base weights to share, listened to, restarted when they die."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from graftwork_server.errors import ErrorBody, FailedPrecondition, Unavailable, body_of
from graftwork_server.types import ModelInfo
from graftwork_server.wire.frames import encode_frame, receive_frame
from graftwork_server.wire.tuning import (
    Failed,
    Finished,
    JobEvent,
    Note,
    Progress,
    SharedWeightsInfo,
    StartTuning,
    TunerTask,
    tuner_decoder,
)

log = logging.getLogger("graftwork.tuners")

_MAX_DEATHS = 3
"""Deaths without a step in between after which a job has failed."""

_EXIT_SECONDS = 3.0


@dataclass
class _Tuner:
    job: TunerTask
    process: subprocess.Popen[bytes]
    connection: socket.socket
    deaths: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    reader: threading.Thread | None = None


class Tuners:
    """Running tuners by job id. Thread-safe."""

    def __init__(
        self,
        weights: SharedWeightsInfo,
        model: ModelInfo,
        *,
        threads: int,
        yield_ms: int,
        send: Callable[[JobEvent], None],
    ) -> None:
        self._weights = weights
        self._model = model
        self._gate_fd = os.memfd_create("graftwork-gate") if hasattr(os, "memfd_create") else _no_gate()
        os.ftruncate(self._gate_fd, mmap.PAGESIZE)
        self._gate = mmap.mmap(self._gate_fd, mmap.PAGESIZE)
        self._threads = threads
        self._yield_ms = yield_ms
        self._send = send
        self._lock = threading.Lock()
        self._tuners: dict[str, _Tuner] = {}

    def set_busy(self, sequences: int) -> None:
        """Tells all tuners how many sequences run or wait: while there are some, they yield (tuning/tuner/gate.py)."""
        struct.pack_into("<q", self._gate, 0, sequences)

    def start(self, job: TunerTask) -> int:
        """Starts a tuner and returns its process id. Raises FailedPrecondition if the job runs already."""
        with self._lock:
            if job.job_id in self._tuners:
                raise FailedPrecondition(f"job {job.job_id} runs already", reason="JOB_RUNNING")
            process, connection = self._spawn(job)
            tuner = _Tuner(job, process, connection)
            self._tuners[job.job_id] = tuner
        tuner.reader = threading.Thread(target=self._listen, args=(tuner,), name=f"tuner-{job.job_id}", daemon=True)
        tuner.reader.start()
        return process.pid

    def stop(self, job_id: str) -> bool:
        """Ends a tuner and waits until its process is gone; no event of it follows. False if it does not run."""
        with self._lock:
            tuner = self._tuners.pop(job_id, None)
            if tuner is None:
                return False
            tuner.stopped.set()
        _end(tuner.process)
        return True

    def stop_all(self) -> None:
        """Ends every tuner."""
        for job_id in list(self._tuners):
            self.stop(job_id)

    def _spawn(self, job: TunerTask) -> tuple[subprocess.Popen[bytes], socket.socket]:
        frame = encode_frame(
            StartTuning(
                job=job,
                model=self._model,
                weights=self._weights,
                gate_fd=self._gate_fd,
                threads=self._threads,
                yield_ms=self._yield_ms,
            )
        )
        mine, theirs = socket.socketpair()
        inherited = [theirs.fileno(), self._gate_fd]
        if self._weights.fd is not None:
            inherited.append(self._weights.fd)
        process = subprocess.Popen(
            [sys.executable, "-m", "graftwork_server.tuner_main", "--fd", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=2,
            # Else MKL's products depend on where its input lies and how its threads meet, and a resumed run would not
            # be equal to an unbroken one, bit for bit (Conditional Numerical Reproducibility, oneMKL's guide).
            env={"MKL_CBWR": "AUTO"} | os.environ,
            pass_fds=inherited,
        )
        theirs.close()
        # A tuner that died at once is noticed by its reader.
        with contextlib.suppress(OSError):
            mine.sendall(frame)
        return process, mine

    def _listen(self, tuner: _Tuner) -> None:
        """Forwards a tuner's events until it has ended its job, was stopped, or died too often. What else goes wrong (a
        message that is none, no process to be had) ends its job and no other."""
        try:
            self._follow(tuner)
        except Exception as error:
            log.exception("the tuner of job %s is given up", tuner.job.job_id)
            with self._lock:
                self._tuners.pop(tuner.job.job_id, None)
            _end(tuner.process)
            self._tell(tuner, Failed(error=body_of(error)))

    def _follow(self, tuner: _Tuner) -> None:
        while True:
            if self._forward(tuner):
                return
            code = tuner.process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            with self._lock:
                if tuner.stopped.is_set():
                    return
                tuner.deaths += 1
                if tuner.deaths < _MAX_DEATHS:
                    log.warning("the tuner of job %s died (%s); starting it again", tuner.job.job_id, how)
                    tuner.process, tuner.connection = self._spawn(tuner.job)
                else:
                    del self._tuners[tuner.job.job_id]
            note = f"the tuner process died ({how})"
            if tuner.deaths < _MAX_DEATHS:
                self._tell(tuner, Note(text=f"{note}; it goes on from its last checkpoint"))
                continue
            message = f"{note} {tuner.deaths} times without a step in between; the server's log has its last words"
            self._tell(tuner, Failed(error=ErrorBody(code="INTERNAL", reason="TUNER_DIED", message=message)))
            return

    def _forward(self, tuner: _Tuner) -> bool:
        """True once the job has ended; False if the connection broke before that."""
        try:
            while True:
                event = tuner_decoder.decode(receive_frame(tuner.connection))
                if isinstance(event, Progress):
                    tuner.deaths = 0
                if isinstance(event, Finished | Failed):
                    # Whoever hears of the end may start the job anew, so it must be forgotten before.
                    with self._lock:
                        self._tuners.pop(tuner.job.job_id, None)
                    _end(tuner.process)
                    self._tell(tuner, event)
                    return True
                self._tell(tuner, event)
        except (EOFError, OSError):
            return False
        finally:
            tuner.connection.close()

    def _tell(self, tuner: _Tuner, event: Progress | Note | Finished | Failed | object) -> None:
        if not tuner.stopped.is_set():
            self._send(JobEvent(job_id=tuner.job.job_id, event=event))  # type: ignore[arg-type]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to end, and ends it if it does not."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.terminate()
        process.wait(_EXIT_SECONDS)
        return
    process.kill()
    process.wait()


def _no_gate() -> int:
    raise Unavailable("this platform has no memfd; Linux is supported", reason="PLATFORM_UNSUPPORTED")
