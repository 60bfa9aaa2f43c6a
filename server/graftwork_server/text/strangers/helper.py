"""One helper process: computes what a stranger's file asks for, where it can hurt nobody.

    front --request--> helper        frames as in wire/frames.py, over a socket pair
          <---answer---

A helper that uses too much of a processor is ended by the kernel, one that does not answer is killed, one that takes
too much memory ends by itself; the next request starts another.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from graftwork_server.errors import ErrorBody, from_body
from graftwork_server.process.priority import step_back
from graftwork_server.wire.frames import encode_frame, receive_frame

MODULE = "graftwork_server.helper_main"
START_SECONDS = 120.0
"""Time to start and to read the base's tokenizer: no stranger's doing, so it does not count against anybody."""
NICENESS = 10
"""With 5, the front's small calls beside templates that loop took three times as long (benchmarks/neighbours.py)."""
OOM_SCORE = 1000
"""It is the first to go where memory runs out."""
PATIENCE = 5
"""A request may take so many times its seconds of a processor: others may be at work on the machine."""


class Limit(msgspec.Struct, frozen=True, tag=True):
    """What follows, all of it together, may use a processor for so long. No answer."""

    seconds: float


class ReadTexts(msgspec.Struct, frozen=True, tag=True):
    """Read the tokenizer and templates of an adapter's folder. Answer: TextFacts."""

    folder: str


class CallText(msgspec.Struct, frozen=True, tag=True):
    """Call a method of the text of a folder ("": the base's). `arguments`: JSON, as it may hold lone surrogates, which
    MessagePack cannot. Answer: Value."""

    folder: str
    method: str
    arguments: str


class CheckDataset(msgspec.Struct, frozen=True, tag=True):
    """Check the lines of a data set with the base's tokenizer. Answer: Value, a DatasetReport as plain data."""

    path: str
    max_sequence_tokens: int
    context_tokens: int


Request = ReadTexts | CallText | CheckDataset


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first message: the helper has started."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request ended with this error. over_limit: because it needed too much memory."""

    error: ErrorBody
    over_limit: bool = False


class TextFacts(msgspec.Struct, frozen=True, tag=True):
    """What the front needs to know of an adapter's tokenizer and templates."""

    is_base: bool
    """Nothing of it differs from the base's."""
    has_chat_template: bool = False
    tokens: list[str | None] | None = None
    """By id; None: the base's."""
    special_ids: list[int] = []
    named_tokens: dict[str, str] = {}


class Value(msgspec.Struct, frozen=True, tag=True):
    """What the method returned."""

    value: Any


Answer = Ready | Refused | TextFacts | Value

request_decoder: msgspec.msgpack.Decoder[Limit | Request] = msgspec.msgpack.Decoder(Limit | Request)
_answer_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class HelperStopped(Exception):
    """A request went over a limit of its helper's. `why`: "time", "memory", or "killed": it was by somebody else."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Helper:
    """A helper process, started when it is first asked and again after it ended. Blocking; for one thread at a time.

    `arguments`: of helper_main. `kill` may be called from any thread.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._deadline = self._asked = 0.0
        self.served: set[str] = set()
        """Keys whose files this process has read."""

    @property
    def started(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    @property
    def idle_seconds(self) -> float:
        """Since it was last asked; 0 where there is no process."""
        return time.monotonic() - self._asked if self.started else 0.0

    def limit(self, seconds: float) -> None:
        """What is asked from now on, all of it together, may use a processor for so long; its start does not count.

        Raises HelperStopped if the process does not start.
        """
        self._start()
        assert self._socket is not None
        self._deadline = time.monotonic() + PATIENCE * seconds
        try:
            self._wait_at_most(self._deadline)
            self._socket.sendall(encode_frame(Limit(seconds)))
        except OSError as error:
            raise HelperStopped(self._end(timed_out=False)) from error

    def ask(self, request: Request) -> TextFacts | Value:
        """The answer. Raises the error that the request ended with, or HelperStopped; the process is gone then."""
        self._start()
        assert self._socket is not None
        try:
            self._wait_at_most(self._deadline)
            self._socket.sendall(encode_frame(request))
            answer = self._receive(self._deadline)
        except (TimeoutError, OSError, EOFError, ValueError, msgspec.DecodeError) as error:
            raise HelperStopped(self._end(timed_out=isinstance(error, TimeoutError))) from error
        self._asked = time.monotonic()
        if isinstance(answer, Ready):
            raise HelperStopped(self._end(timed_out=False))
        if isinstance(answer, Refused):
            raise HelperStopped("memory") if answer.over_limit else from_body(answer.error)
        return answer

    def kill(self) -> None:
        """Ends the process, if there is one; whoever waits for an answer gets HelperStopped."""
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """Ends the process and waits for it."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is not None:
            process.kill()
            process.wait()
        self.served.clear()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", MODULE, str(theirs.fileno()), str(os.getpid()), *self._arguments]
            # Strangers' panics and warnings are no lines of the server's log; what fails is in the answer.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for the front, which ends its helpers
                pass_fds=[theirs.fileno()],
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"},
            )
        # Now, not when it has imported what it needs: that alone takes a processor for a quarter of a second.
        step_back(NICENESS, OOM_SCORE, self._process.pid)
        self._socket, self._asked = ours, time.monotonic()
        deadline = time.monotonic() + START_SECONDS
        try:
            self._receive(deadline)
        except (TimeoutError, OSError, EOFError, ValueError, msgspec.DecodeError) as error:
            self._end(timed_out=False)
            raise HelperStopped("killed") from error

    def _receive(self, deadline: float) -> Answer:
        assert self._socket is not None
        self._wait_at_most(deadline)
        # Its size is bounded by MAX_FRAME_BYTES. A helper that sends half of it and stalls is met by the timeout of
        # each read; that it sends byte by byte to gain time, no stranger's file can make it do.
        return _answer_decoder.decode(receive_frame(self._socket))

    def _wait_at_most(self, deadline: float) -> None:
        assert self._socket is not None
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _end(self, timed_out: bool) -> str:
        """Ends the process and says why it gave no answer."""
        process = self._process
        if timed_out or process is None:
            self.close()
            return "time"
        try:
            status = process.wait(1)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        self.close()
        if status == -signal.SIGPROF:  # of the timer that Limit sets
            return "time"
        # Rust aborts where it gets no memory; a stack that overflows is a segmentation fault.
        return "killed" if status == -signal.SIGKILL else "memory"
