"""The engine process from outside: spawned with a private unix socket, greeted, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork_server.errors import Internal, from_body
from graftwork_server.messages import Hello, StartFailed, engine_decoder, read_frame

ENGINE_COMMAND = (sys.executable, "-m", "graftwork_server.engine_main")
LEAST_EXIT_SECONDS = 2.0
"""A process that dies by itself gets this long, so that its own exit status is seen and not our kill."""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
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

    async def launch(self) -> Greeting:
        """Starts a process and waits for its greeting.

        Raises the error of its StartFailed, or Internal (ENGINE_DIED) if it ended without a word.
        """
        connections: asyncio.Queue[Connection] = asyncio.Queue()
        # The socket's name is there until the engine has connected, and no longer: even a killed front leaves nothing.
        folder = _private_folder()
        server = await asyncio.start_unix_server(
            lambda reader, writer: connections.put_nowait((reader, writer)), folder / "engine.sock"
        )
        try:
            message, reader, writer = await self._greeted(folder / "engine.sock", connections)
        finally:
            server.close()
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(message, StartFailed):
            writer.close()
            await self.reap()
            raise from_body(message.error)
        return message, reader, writer

    async def _greeted(
        self, path: Path, connections: asyncio.Queue[Connection]
    ) -> tuple[Hello | StartFailed, asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            # Own session: Ctrl-C in a terminal reaches the front only, which then drains. stdout goes to stderr (fd 2).
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                "--socket",
                str(path),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
            )
        except OSError as error:
            raise Internal(f"the engine process could not be started: {error.strerror}", reason="ENGINE_DIED") from None
        exited = asyncio.ensure_future(self._process.wait())
        greeting = asyncio.ensure_future(_first_greeting(connections))
        try:
            await asyncio.wait({exited, greeting}, return_when=asyncio.FIRST_COMPLETED)
            if not greeting.done():
                # What it wrote before it died (StartFailed, usually) may still lie in the socket.
                await asyncio.wait({greeting}, timeout=0.5)
            if not greeting.done():
                raise Internal(f"the engine process ended {self.end}", reason="ENGINE_DIED")
            return greeting.result()
        finally:
            greeting.cancel()
            exited.cancel()

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


async def _first_greeting(
    connections: asyncio.Queue[Connection],
) -> tuple[Hello | StartFailed, asyncio.StreamReader, asyncio.StreamWriter]:
    """The first connection whose first message is a greeting."""
    while True:
        reader, writer = await connections.get()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            message = engine_decoder.decode(await read_frame(reader))
            if isinstance(message, Hello | StartFailed):
                return message, reader, writer
        writer.close()


def _private_folder() -> Path:
    """A new folder that only this user can open (0700), with a name short enough for a unix socket in it."""
    folder = tempfile.mkdtemp(prefix="graftwork-")
    if len(folder) > 80:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="graftwork-", dir="/tmp")
    return Path(folder)
