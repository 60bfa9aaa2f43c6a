"""Keeps an engine running: starts one, starts another when it dies, gives up after failures in a row.

Everything here runs on one event loop. What is said to an engine, and what it says, is engine_client.py's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from graftwork_server.errors import (
    FailedPrecondition,
    GraftworkServerError,
    Internal,
    Unavailable,
    body_of,
    from_body,
)
from graftwork_server.front.engine_process import EngineProcess
from graftwork_server.front.suspects import InFlight
from graftwork_server.wire.engine import Hello
from graftwork_server.wire.tuning import JobEvent

log = logging.getLogger("graftwork.engine")

MAX_FAST_FAILURES = 5
FAST_FAILURE_SECONDS = 30.0
FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 10.0
EXIT_SECONDS = 5.0


class EngineListener(Protocol):
    """Who wants to know what happens to the engine. Called on the event loop, in order; must not block."""

    def on_engine_ready(self) -> None:
        """An engine answers: the first one, or one that replaced a dead one."""

    def on_engine_lost(self) -> None:
        """The engine died; whatever ran in it, tuning jobs included, is gone."""

    def on_job_event(self, event: JobEvent) -> None:
        """A tuner said something."""


class Conversation(Protocol):
    """What the supervisor needs of the one who speaks with the engines."""

    loaded: set[str]
    """Digests on the device now."""

    @property
    def ready(self) -> bool:
        """Whether an engine answers now."""

    @property
    def running(self) -> int:
        """Sequences that wait for tokens."""

    def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """There is an engine, and this is its connection."""

    async def read_until_lost(self) -> None:
        """Handles what the engine says; returns when nothing more can come."""

    def shut_down(self, drain_ms: int) -> None:
        """Asks the engine to end, once its running sequences have, after `drain_ms` at the latest."""

    def disconnect(self, error: GraftworkServerError) -> None:
        """Ends every stream and call with `error`."""


class EngineSupervisor:
    """One engine after another, for one conversation."""

    def __init__(self, process: EngineProcess, conversation: Conversation, in_flight: InFlight) -> None:
        self._process = process
        self._conversation = conversation
        self._in_flight = in_flight
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._failures = 0
        """In a row: engines that died soon after they had started, and starts that failed."""
        self._started = 0.0
        """When the newest start began."""
        self.listeners: list[EngineListener] = []
        self.hello: Hello | None = None
        """What the newest engine said of itself; None before the first."""
        self.failure: asyncio.Future[GraftworkServerError] = asyncio.get_running_loop().create_future()
        """Done once restarts were given up, with the error that says why."""

    async def start(self) -> Hello:
        """Starts the engine and waits until the base model is loaded.

        Raises the engine's own error when the model cannot be served, and Internal when the process just ended.
        """
        try:
            hello = await self._connect()
        except BaseException:
            await self.stop()
            raise
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")
        self.tell(lambda listener: listener.on_engine_ready())
        return hello

    async def stop(self, drain_ms: int = 0) -> None:
        """Lets running sequences finish for at most `drain_ms`, then ends the engine. May be called twice."""
        self._stopping = True
        if self._conversation.ready:
            self._conversation.shut_down(drain_ms)
            await self._process.reap(drain_ms / 1000 + EXIT_SECONDS)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._conversation.disconnect(Unavailable("the server is shutting down", reason="SHUTTING_DOWN"))
        await self._process.reap()

    def tell(self, what: Callable[[EngineListener], None]) -> None:
        """Tells every listener. What one makes of it is no other's matter, and not the engine's."""
        for listener in self.listeners:
            try:
                what(listener)
            except Exception:
                log.exception("%s failed on news of the engine", type(listener).__name__)

    async def _connect(self) -> Hello:
        self._started = time.monotonic()
        hello, reader, writer = await self._process.launch()
        if self.hello is not None and hello.model.fingerprint != self.hello.model.fingerprint:
            writer.close()
            await self._process.reap()
            raise FailedPrecondition("the base model's files changed while the server ran", reason="BASE_CHANGED")
        self.hello = hello
        self._conversation.connect(reader, writer)
        return hello

    async def _supervise(self) -> None:
        while True:
            await self._conversation.read_until_lost()
            if self._stopping:
                return
            error = await self._died()
            if not await self._start_again(error):
                return
            log.info("the engine is back (process %s)", self._process.pid)
            self.tell(lambda listener: listener.on_engine_ready())

    async def _died(self) -> GraftworkServerError:
        """Ends what ran in the engine, counts its death, and says what it was."""
        running, loaded = self._conversation.running, self._conversation.loaded
        self._conversation.disconnect(engine_restarting())
        self.tell(lambda listener: listener.on_engine_lost())
        await self._process.reap()
        error = Internal(f"the engine ended {self._process.end}", reason="ENGINE_DIED")
        log.error("%s; %d sequences were running", error.message, running)
        is_fast = time.monotonic() - self._started < FAST_FAILURE_SECONDS
        # What a client's input did says nothing of the engine, whose start proved that it can compute.
        has_suspects = self._in_flight.died(loaded, killed=self._process.was_killed)
        self._failures = 0 if has_suspects else self._failures + 1 if is_fast else 1
        return error

    async def _start_again(self, error: GraftworkServerError) -> bool:
        """Starts engines until one answers; false if it was given up. `error`: why the last one is gone."""
        while not self._stopping:
            if self._failures >= MAX_FAST_FAILURES:
                text = f"gave up after {self._failures} failures of the engine in a row; the last: {error.message}"
                self.failure.set_result(Internal(text, reason="ENGINE_GIVEN_UP"))
                return False
            await asyncio.sleep(_backoff_seconds(self._failures))
            try:
                await self._connect()
            except Exception as raised:  # no socket or no process to be had: there may be the next time
                self._failures, error = self._failures + 1, from_body(body_of(raised))
                log.error("the engine did not start again: %s", error.message)
            else:
                return True
        return False


def _backoff_seconds(failures: int) -> float:
    """The wait before the next start after so many failures: doubled each time, up to a bound."""
    return min(FIRST_BACKOFF_SECONDS * 2 ** max(failures - 1, 0), LONGEST_BACKOFF_SECONDS)


def engine_restarting() -> Unavailable:
    """The error of every call while there is no engine."""
    return Unavailable(
        "the engine is restarting; send the request again",
        reason="ENGINE_RESTARTING",
        metadata={"retry_after_ms": "1000"},
    )
