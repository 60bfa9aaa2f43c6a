"""The engine process from outside: spawned with one end of a socket pair, greeted, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from graftwork_server.errors import Internal, from_body
from graftwork_server.process.priority import yielding
from graftwork_server.wire.engine import Hello, StartFailed, engine_decoder
from graftwork_server.wire.frames import read_frame

ENGINE_COMMAND = (sys.executable, "-m", "graftwork_server.engine_main")
LEAST_EXIT_SECONDS = 2.0
"""A process that dies by itself gets this long, so that its own exit status is seen and not our kill."""

Greeting = tuple[Hello, asyncio.StreamReader, asyncio.StreamWriter]


class EngineProcess:
    """One engine process after another. The engine ends by itself when its connection closes."""

    def __init__(self, settings: Mapping[str, Any], command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._arguments = [*command, "--settings", json.dumps(dict(settings))]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the newest process."""
        return self._process.pid if self._process else None

    @property
    def end(self) -> str:
        """How the newest process ended, as the end of a sentence."""
        code = self._process.returncode if self._process else None
        if code is None:
            return "its connection"
        return f"with signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    @property
    def was_killed(self) -> bool:
        """Whether the newest process was ended from outside, as the kernel does when memory runs out."""
        return self._process is not None and self._process.returncode in (-signal.SIGKILL, -signal.SIGTERM)

    async def launch(self) -> Greeting:
        """Starts a process and waits for its greeting.

        Raises the error of its StartFailed, or Internal (ENGINE_DIED) if it ended without a word.
        """
        # A pair without a name: whoever is killed, and whenever, nothing is left behind, and nobody else can connect.
        ours, theirs = socket.socketpair()
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        try:
            message = await self._greeted(theirs, reader)
        except BaseException:
            writer.close()  # it ends by itself now, wherever in its start it is
            raise
        if isinstance(message, StartFailed):
            writer.close()
            await self.reap()
            raise from_body(message.error)
        return message, reader, writer

    async def _greeted(self, theirs: socket.socket, reader: asyncio.StreamReader) -> Hello | StartFailed:
        try:
            # Own session: Ctrl-C in a terminal reaches the front only, which then drains. stdout goes to stderr (fd 2).
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                "--fd",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                env=yielding(os.environ),
                pass_fds=[theirs.fileno()],
            )
        except OSError as error:
            raise Internal(f"the engine process could not be started: {error.strerror}", reason="ENGINE_DIED") from None
        finally:
            theirs.close()
        # What it wrote before it died (StartFailed, usually) comes before the end of the stream.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            message = engine_decoder.decode(await read_frame(reader))
            if isinstance(message, Hello | StartFailed):
                return message
        await self.reap()
        raise Internal(f"the engine process ended {self.end}", reason="ENGINE_DIED")

    async def reap(self, seconds: float = 0.0) -> None:
        """Waits for the process to end; after `seconds`, or a little more, it is killed."""
        if self._process is None:
            return
        try:
            # Not wait_for, which may swallow a cancellation (python/cpython#86296).
            async with asyncio.timeout(max(seconds, LEAST_EXIT_SECONDS)):
                await self._process.wait()
        except TimeoutError:
            # Its whole session: a tuner must not outlive the engine and train on for nobody.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
