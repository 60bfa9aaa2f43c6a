"""The engine as a process: takes the front's messages, runs the step loop, sends what it produced.

Threads: the main thread runs the loop and is the only one that touches sequences and the device's step; one reads the
socket, one writes it (outbox.py), a few load adapters, one compiles grammars, one answers questions (inspect, prepare),
and each tuner has a reader. They meet in the inbox, a queue of messages and callbacks that the loop empties between two
steps.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
from llguidance import LLMatcher

from graftwork_plugins import BaseInfo, Delta, DeviceInfo
from graftwork_server.engine.adapters.bind import bind
from graftwork_server.engine.adapters.loaded import LoadedAdapter, PreparedAdapter
from graftwork_server.engine.adapters.loader import Loads
from graftwork_server.engine.engine import Engine, EngineLimits
from graftwork_server.engine.helper_threads import HelperThreads, compute_alone, compute_behind
from graftwork_server.engine.outbox import Outbox
from graftwork_server.engine.sampling.grammars import Grammars
from graftwork_server.engine.tuners import Tuners
from graftwork_server.errors import ErrorBody, FailedPrecondition, GraftworkServerError, Unavailable, body_of
from graftwork_server.layers.base_model import BaseModel
from graftwork_server.types import AdapterRef, ArtifactInfo, StrategyInfo
from graftwork_server.wire.engine import (
    Cancel,
    FrontMessage,
    Generate,
    Grammar,
    Hello,
    Inspect,
    InspectReply,
    Load,
    LoadedChanged,
    LoadReply,
    Pin,
    Pinned,
    Reply,
    Result,
    SequenceOutput,
    Shutdown,
    Unload,
    Unloaded,
    front_decoder,
)
from graftwork_server.wire.frames import receive_frame
from graftwork_server.wire.tuning import PreparedJob, PrepareJob, Started, StartJob, StopJob, Stopped

log = logging.getLogger("graftwork.engine")

FIGURES_SECONDS = 60.0
"""Time between two log lines that say how well the prefix cache does."""


class Strategies(Protocol):
    """What the engine needs of the plugins; plugin_host.PluginHost is the one there is."""

    def infos(self) -> list[StrategyInfo]: ...
    def identify(self, path: Path) -> str: ...
    def load_deltas(self, path: Path, strategy_id: str, base: BaseInfo) -> list[Delta]: ...
    def prepare_job(
        self,
        strategy: str,
        config: dict[str, Any],
        row_count: int,
        total_tokens: int,
        base: BaseInfo,
        device: DeviceInfo,
        held_out_rows: int = 0,
    ) -> PreparedJob: ...


class EngineWorker:
    """One engine, its connection to the front, and its helpers."""

    def __init__(
        self,
        base: BaseModel,
        base_info: BaseInfo,
        limits: EngineLimits,
        strategies: Strategies,
        connection: socket.socket,
        *,
        threads: int,
        tuning_yield_ms: int,
        messages_per_second: int,
    ) -> None:
        self.engine = Engine(base, limits, self._ensure_loaded)
        self._base_info = base_info
        self._limits = limits
        self._strategies = strategies
        self._connection = connection
        self._threads = threads
        self._inbox: queue.SimpleQueue[FrontMessage | Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox = Outbox(connection, messages_per_second, lambda id: self._inbox.put(Cancel(id=id)))
        self._stop = threading.Event()
        self._loads = Loads(self._prepare_adapter, self.engine.adapters)
        self._answers = HelperThreads(1, "answer", compute_alone)
        self._compiler = HelperThreads(1, "compile", compute_behind)
        self._grammars = Grammars(base.info)
        self._compiling: set[int] = set()
        """Sequences whose grammar is being compiled."""
        self._loading: dict[str, list[int]] = {}
        """Loads under way: digest -> calls that wait for them."""
        self._unloading: dict[LoadedAdapter, list[int]] = {}
        """Calls that wait for an adapter's last lease to end."""
        self._to_unload: dict[str, list[int]] = {}
        """Calls that wait for a load under way, to unload what it brings."""
        self._reported = 0
        """The pool's generation that the front knows of."""
        self._deadline: float | None = None
        self._figures = self.engine.cache_figures
        self._figures_told = time.monotonic()
        self._gate_fd = os.memfd_create("graftwork-gate") if hasattr(os, "memfd_create") else _gate_file()
        os.ftruncate(self._gate_fd, mmap.PAGESIZE)
        self._gate = mmap.mmap(self._gate_fd, mmap.PAGESIZE)
        self._tuners = Tuners(
            base.weights.info(),
            self.model_info(),
            self._gate_fd,
            threads=threads,
            yield_ms=tuning_yield_ms,
            send=self._outbox.send,
        )

    def model_info(self) -> Any:
        """The base as the front gets to know it."""
        return msgspec.structs.replace(
            self.engine.base.info, kv_tokens=self.engine.kv_tokens, max_sequences=self._limits.max_sequences
        )

    def run(self) -> None:
        """Greets the front and serves until the connection closes or Shutdown is done.

        What is unexpected in the step loop, or in reading and writing, ends the process: raised here, or logged as its
        last words.
        """
        threading.Thread(target=self._read, name="read", daemon=True).start()
        writer = threading.Thread(target=self._write, name="write", daemon=True)
        writer.start()
        self._outbox.send(Hello(pid=os.getpid(), model=self.model_info(), strategies=self._strategies.infos()))
        try:
            self._loop()
        finally:
            self._tell_figures()
            self._stop.set()
            self._loads.give_up()
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
        struct.pack_into("<q", self._gate, 0, self._active)
        if time.monotonic() - self._figures_told > FIGURES_SECONDS:
            self._tell_figures()
        pool = self.engine.adapters
        if self._loading:
            pool.wanted = self.engine.waited_for()
        for digest, calls in self._loading.items():
            if not calls and digest not in pool.wanted:
                self._loads.set_due(digest, False)
        for digest in [digest for digest in self._to_unload if digest not in self._loading]:
            for call_id in self._to_unload.pop(digest):
                self._unload(digest, call_id)
        self._tell_loaded()
        for adapter in [adapter for adapter in self._unloading if adapter.gone]:
            for call_id in self._unloading.pop(adapter):
                self._reply(call_id, Unloaded(was_loaded=True))

    def _tell_loaded(self) -> None:
        """Before any answer that depends on it: whoever asked finds the list as the answer says."""
        pool = self.engine.adapters
        if pool.generation != self._reported:
            self._reported = pool.generation
            self._outbox.send(LoadedChanged(digests=pool.digests()))

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
                self._load_call(message)
            case Unload():
                self._unload_call(message)
            case Pin():
                self.engine.adapters.pin(message.digests)
                self._reply(message.call_id, Pinned())
            case Inspect():
                self._answer(message.call_id, lambda: self._inspect(message))
            case PrepareJob():
                self._answer(message.call_id, lambda: self._prepare(message))
            case StartJob():
                self._answer(message.call_id, lambda: Started(pid=self._tuners.start(message.job)))
            case StopJob():
                self._answer(message.call_id, lambda: Stopped(was_running=self._tuners.stop(message.job_id)))
            case Shutdown():
                self._deadline = time.monotonic() + message.drain_ms / 1000
            case _:
                message()

    def _add(self, message: Generate, matcher: LLMatcher | None = None) -> None:
        refused = self.engine.add(message, matcher)
        if refused is not None:
            self._outbox.publish([refused])
        elif message.adapter is not None:
            self._load_ahead(message.adapter)

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
                error = _error_body(raised)
            self._inbox.put(lambda: compiled(matcher, error))

        self._compiler.submit(work)

    def _answer(self, call_id: int, work: Callable[[], Result]) -> None:
        """Runs `work` off the step loop and replies with its result or error."""

        def run() -> None:
            try:
                self._reply(call_id, work())
            except BaseException as error:
                self._reply_error(call_id, _error_body(error))

        self._answers.submit(run)

    def _inspect(self, message: Inspect) -> InspectReply:
        path = Path(message.path)
        strategy = message.strategy or self._strategies.identify(path)
        deltas = self._strategies.load_deltas(path, strategy, self._base_info)
        prepared = bind(self.engine.base, "", deltas, place=False)
        info = ArtifactInfo(
            strategy=strategy,
            parameter_count=prepared.parameter_count,
            rank=prepared.rank,
            modules_bound=prepared.modules_bound,
        )
        return InspectReply(info=info)

    def _prepare(self, message: PrepareJob) -> PreparedJob:
        device = DeviceInfo(
            type="cuda" if self.engine.base.device.type == "cuda" else "cpu",
            total_memory_bytes=_total_memory(self.engine.base.device),
            threads=self._threads,
        )
        return self._strategies.prepare_job(
            message.strategy,
            message.config,
            message.row_count,
            message.total_tokens,
            self._base_info,
            device,
            message.held_out_rows,
        )

    # ------------------------------------------------------------------------------------------ adapters

    def _load_call(self, message: Load) -> None:
        report = self.engine.adapters.report(message.adapter.digest)
        if report is not None:
            self._tell_loaded()
            self._reply(
                message.call_id, LoadReply(report=msgspec.structs.replace(report, load_ms=0.0, already_loaded=True))
            )
            return
        self._ensure_loaded(message.adapter)
        self._loading[message.adapter.digest].append(message.call_id)

    def _unload_call(self, message: Unload) -> None:
        if message.digest in self._loading:
            self._to_unload.setdefault(message.digest, []).append(message.call_id)
        else:
            self._unload(message.digest, message.call_id)

    def _unload(self, digest: str, call_id: int) -> None:
        if self.engine.adapters.is_pinned(digest):
            pinned = FailedPrecondition("the adapter is pinned; unpin it first", reason="ADAPTER_PINNED", field="name")
            self._reply_error(call_id, body_of(pinned))
            return
        adapter = self.engine.adapters.unload(digest)
        if adapter is None:
            self._tell_loaded()
            self._reply(call_id, Unloaded(was_loaded=False))
        else:
            self._unloading.setdefault(adapter, []).append(call_id)

    def _load_ahead(self, adapter: AdapterRef) -> None:
        """Starts a load for a sequence that may have to wait for other reasons too."""
        if adapter.digest not in self._loading and self.engine.adapters.report(adapter.digest) is None:
            self._start_load(adapter, is_due=False)

    def _ensure_loaded(self, adapter: AdapterRef) -> None:
        """Starts a load unless one is under way; it is needed now. Called in the step thread."""
        if adapter.digest in self._loading:
            self._loads.set_due(adapter.digest, True)
        else:
            self._start_load(adapter, is_due=True)

    def _start_load(self, adapter: AdapterRef, *, is_due: bool) -> None:
        def done(result: LoadedAdapter | BaseException | None) -> None:
            self._inbox.put(lambda: self._load_done(adapter, result))

        self._loading[adapter.digest] = []
        self._loads.start(adapter, done, is_due=is_due)

    def _prepare_adapter(self, adapter: AdapterRef) -> PreparedAdapter:
        deltas = self._strategies.load_deltas(Path(adapter.path), adapter.strategy, self._base_info)
        return bind(self.engine.base, adapter.digest, deltas)

    def _load_done(self, adapter: AdapterRef, result: LoadedAdapter | BaseException | None) -> None:
        if isinstance(result, BaseException):
            self._load_failed(adapter.digest, _error_body(result))
            return
        calls = self._loading.pop(adapter.digest)
        if result is not None:
            self.engine.arrived(result)
            self._tell_loaded()
            for call_id in calls:
                self._reply(call_id, LoadReply(report=result.report))
        elif calls:  # they came while it was loaded ahead of time, which found no room
            self._ensure_loaded(adapter)
            self._loading[adapter.digest] += calls

    def _load_failed(self, digest: str, error: ErrorBody) -> None:
        log.warning("adapter %s could not be loaded: %s", digest[:19], error.message)
        for call_id in self._loading.pop(digest):
            self._reply_error(call_id, error)
        failed = self.engine.fail_waiting(digest, error)
        if failed:
            self._outbox.publish(failed)

    # ------------------------------------------------------------------------------------------ connection

    def _reply(self, call_id: int, result: Result) -> None:
        self._outbox.send(Reply(call_id=call_id, result=result))

    def _reply_error(self, call_id: int, error: ErrorBody) -> None:
        self._outbox.send(Reply(call_id=call_id, error=error))

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


def _error_body(error: BaseException) -> ErrorBody:
    """`error` as data; what is not one of ours is a defect, and only here is known where it came from."""
    if not isinstance(error, GraftworkServerError):
        log.error("a call failed in the engine", exc_info=error)
    return body_of(error)


def _gate_file() -> int:
    raise Unavailable("this platform has no memfd; Linux is supported", reason="PLATFORM_UNSUPPORTED")


def _total_memory(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
