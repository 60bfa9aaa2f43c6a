"""The engine as a process: takes the front's messages, runs the step loop, sends what it produced.

Threads: the main thread runs the loop and is the only one that touches sequences and the device's step; one reads the
socket, one writes it (outbox.py), a few load adapters, one compiles grammars, one checks files and settings, one starts
and ends tuners, and each tuner has a reader. They meet in the inbox, a queue of messages and callbacks that the loop
empties between two steps.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
from llguidance import LLMatcher

from graftwork_plugins import BaseInfo
from graftwork_server.config import ServerConfig
from graftwork_server.engine.adapters.service import AdapterService, error_body
from graftwork_server.engine.engine import Engine
from graftwork_server.engine.helper_threads import HelperThreads, compute_alone, compute_behind
from graftwork_server.engine.outbox import Outbox
from graftwork_server.engine.plugin_calls import PluginCalls, Strategies
from graftwork_server.engine.sampling.grammars import Grammars
from graftwork_server.engine.tuners import Tuners
from graftwork_server.errors import ErrorBody
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.wire.engine import (
    Cancel,
    FrontMessage,
    Generate,
    Grammar,
    Hello,
    Inspect,
    Load,
    Pin,
    Result,
    SequenceOutput,
    Shutdown,
    Unload,
    front_decoder,
)
from graftwork_server.wire.frames import receive_frame
from graftwork_server.wire.tuning import PrepareJob, Started, StartJob, StopJob, Stopped

log = logging.getLogger("graftwork.engine")

FIGURES_SECONDS = 60.0
"""Time between two log lines that say how well the prefix cache does."""


class EngineWorker:
    """One engine, its connection to the front, and its helpers."""

    def __init__(
        self,
        base: BaseModel,
        base_info: BaseInfo,
        settings: ServerConfig,
        strategies: Strategies,
        connection: socket.socket,
        *,
        threads: int,
    ) -> None:
        """threads: that compute, in the step loop and in tuners."""
        self.engine = Engine(base, settings, lambda adapter: self.adapters.ensure_loaded(adapter))
        self._plugins = PluginCalls(base, base_info, strategies, threads)
        self._max_sequences = settings.max_sequences
        self._connection = connection
        self._inbox: queue.SimpleQueue[FrontMessage | Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox = Outbox(connection, settings.messages_per_second, lambda id: self._inbox.put(Cancel(id=id)))
        self._stop = threading.Event()
        self.adapters = AdapterService(self.engine, self._plugins, self._outbox, self._inbox.put)
        self._checks = HelperThreads(1, "check", compute_alone)
        """Reads files, for as long as that takes."""
        self._jobs = HelperThreads(1, "jobs", compute_alone)
        """Starts and ends tuners, which waits for nothing else."""
        self._compiler = HelperThreads(1, "compile", compute_behind)
        self._grammars = Grammars(base.info)
        self._compiling: set[int] = set()
        """Sequences whose grammar is being compiled."""
        self._deadline: float | None = None
        self._figures = self.engine.cache_figures
        self._figures_told = time.monotonic()
        self._tuners = Tuners(
            base.weights.info(),
            self.model_info(),
            threads=threads,
            yield_ms=settings.tuning_yield_ms,
            send=self._outbox.send,
        )

    def model_info(self) -> Any:
        """The base as the front gets to know it."""
        return msgspec.structs.replace(
            self.engine.base.info, kv_tokens=self.engine.kv_tokens, max_sequences=self._max_sequences
        )

    def run(self) -> None:
        """Greets the front and serves until the connection closes or Shutdown is done.

        What is unexpected in the step loop, or in reading and writing, ends the process: raised here, or logged as its
        last words.
        """
        threading.Thread(target=self._read, name="read", daemon=True).start()
        writer = threading.Thread(target=self._write, name="write", daemon=True)
        writer.start()
        self._outbox.send(Hello(pid=os.getpid(), model=self.model_info(), strategies=self._plugins.strategies.infos()))
        try:
            self._loop()
        finally:
            self._tell_figures()
            self._stop.set()
            self.adapters.give_up()
            self._tuners.stop_all()
            self._outbox.close()
            writer.join(timeout=2)

    def _loop(self) -> None:
        idle = True
        while not self._stop.is_set():
            # With nothing to run, only a message can change that: a request, or a load that is done.
            self._take_messages(block=idle)
            outputs = self.engine.step()
            if outputs:
                self._outbox.publish(outputs)
            self._after_step()
            # Where something ended, what waited for its place can run now.
            idle = not self.engine.has_running and not outputs
            if self._deadline is not None and (self._active == 0 or time.monotonic() > self._deadline):
                return

    @property
    def _active(self) -> int:
        return self.engine.active + len(self._compiling)

    def _tell_figures(self) -> None:
        """Logs how many prompt tokens since the start were in the KV cache, if there were new ones."""
        self._figures_told = time.monotonic()
        if self._figures != self.engine.cache_figures:
            self._figures = tokens, cached = self.engine.cache_figures
            share = 100 * cached / tokens
            log.info("prefix cache: %d of %d prompt tokens since the start were in it (%.1f%%)", cached, tokens, share)

    def _after_step(self) -> None:
        self._tuners.set_busy(self._active)
        if time.monotonic() - self._figures_told > FIGURES_SECONDS:
            self._tell_figures()
        self.adapters.after_step()

    # ------------------------------------------------------------------------------------------ messages

    def _take_messages(self, block: bool) -> None:
        timeout = None
        if self._deadline is not None:
            timeout = max(0.0, self._deadline - time.monotonic())
        try:
            self._handle(self._inbox.get(block=block, timeout=timeout))
            while True:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _handle(self, message: FrontMessage | Callable[[], None] | None) -> None:
        match message:
            case None:
                self._stop.set()
            case Generate():
                if message.sampling.grammar is None:
                    self._add(message)
                else:
                    self._compile(message, message.sampling.grammar)
            case Cancel():
                self._compiling.discard(message.id)
                self.engine.cancel(message.id)
                self._outbox.forget(message.id)
            case Load():
                self.adapters.load(message)
            case Unload():
                self.adapters.unload(message)
            case Pin():
                self.adapters.pin(message)
            case Inspect():
                self._answer(self._checks, message.call_id, lambda: self._plugins.inspect(message))
            case PrepareJob():
                self._answer(self._checks, message.call_id, lambda: self._plugins.prepare_job(message))
            case StartJob():
                self._answer(self._jobs, message.call_id, lambda: Started(pid=self._tuners.start(message.job)))
            case StopJob():
                self._answer(
                    self._jobs, message.call_id, lambda: Stopped(was_running=self._tuners.stop(message.job_id))
                )
            case Shutdown():
                self._deadline = time.monotonic() + message.drain_ms / 1000
            case _:
                message()

    def _add(self, message: Generate, matcher: LLMatcher | None = None) -> None:
        refused = self.engine.add(message, matcher)
        if refused is not None:
            self._outbox.publish([refused])
        elif message.adapter is not None:
            self.adapters.load_ahead(message.adapter)

    def _compile(self, message: Generate, grammar: Grammar) -> None:
        """Compiles off the step loop; the sequence is queued when that is done, unless it was cancelled meanwhile."""
        self._compiling.add(message.id)

        def compiled(matcher: LLMatcher | None, error: ErrorBody | None) -> None:
            if message.id not in self._compiling:
                return
            self._compiling.discard(message.id)
            if error is None:
                self._add(message, matcher)
            else:
                self._outbox.publish([SequenceOutput(message.id, [], "error", error=error)])

        def work() -> None:
            matcher, error = None, None
            try:
                if message.id in self._compiling:
                    matcher = self._grammars.matcher(grammar, message.adapter)
            except BaseException as raised:
                error = error_body(raised)
            self._inbox.put(lambda: compiled(matcher, error))

        self._compiler.submit(work)

    def _answer(self, threads: HelperThreads, call_id: int, work: Callable[[], Result]) -> None:
        """Runs `work` off the step loop and replies with its result or error."""

        def run() -> None:
            try:
                self._outbox.reply(call_id, work())
            except BaseException as error:
                self._outbox.reply(call_id, error_body(error))

        threads.submit(run)

    # ------------------------------------------------------------------------------------------ connection

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put(front_decoder.decode(receive_frame(self._connection)))
        except (EOFError, OSError):
            self._inbox.put(None)  # the front is gone, and with it everybody who could read an answer

    def _write(self) -> None:
        try:
            self._outbox.run()
        except OSError:
            self._inbox.put(None)
