"""The front's side of the engine: what it is told, and what it says, handed to whoever waits for it.

One task takes every frame from the socket and hands tokens to the streams that wait for them; the same one starts the
engine again when it dies (engine_supervisor.py). Everything here runs on one event loop; nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from graftwork_server.errors import GraftworkServerError, Internal, Unavailable, from_body
from graftwork_server.front.engine_process import ENGINE_COMMAND, EngineProcess
from graftwork_server.front.engine_supervisor import EngineListener, EngineSupervisor, engine_restarting
from graftwork_server.front.output_stream import OutputStream
from graftwork_server.front.suspects import InFlight
from graftwork_server.logs import log_event
from graftwork_server.types import AdapterRef, ArtifactInfo, LoadReport, ModelInfo, StrategyInfo
from graftwork_server.wire.engine import (
    Cancel,
    EngineMessage,
    Generate,
    Hello,
    Inspect,
    InspectReply,
    Load,
    LoadedChanged,
    LoadReply,
    Pin,
    Pinned,
    Pool,
    Pooled,
    Reply,
    Result,
    Sampling,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    Unload,
    Unloaded,
    engine_decoder,
)
from graftwork_server.wire.frames import encode_frame, read_frame
from graftwork_server.wire.tuning import (
    JobEvent,
    PreparedJob,
    PrepareJob,
    Started,
    StartJob,
    StopJob,
    Stopped,
    TunerTask,
)

log = logging.getLogger("graftwork.engine")

SHOWN_DIGEST = 19
"""Characters of a digest that a log line has: "sha256:" and twelve more."""
MAX_NAMES = 10_000


class EngineClient:
    """The engine process of this server. Raises Unavailable (ENGINE_RESTARTING) from every call while there is none."""

    def __init__(self, settings: Mapping[str, Any], *, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._process = EngineProcess(settings, command)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._next_id = 1
        self._streams: dict[int, OutputStream] = {}
        self._calls: dict[int, asyncio.Future[Result]] = {}
        self._in_flight = InFlight()
        self.loaded: set[str] = set()
        """Digests on the device now."""
        self._names: dict[str, str] = {}
        """What was asked for last by these digests, for the log."""
        self._supervisor = EngineSupervisor(self._process, self, self._in_flight)
        self.failure = self._supervisor.failure
        """Done once restarts were given up, with the error that says why."""

    # ------------------------------------------------------------------------------------------ what it is

    @property
    def ready(self) -> bool:
        """Whether an engine answers now."""
        return self._writer is not None

    @property
    def process_id(self) -> int | None:
        """Process id of the newest engine."""
        return self._process.pid

    @property
    def model(self) -> ModelInfo:
        """The base model. Known from the first start on, also while the engine restarts."""
        return self._first_hello().model

    @property
    def strategies(self) -> list[StrategyInfo]:
        """Strategies of the newest engine."""
        return self._first_hello().strategies

    @property
    def running(self) -> int:
        """Sequences that wait for tokens."""
        return len(self._streams)

    def add_listener(self, listener: EngineListener) -> None:
        """`listener` hears of everything from now on."""
        self._supervisor.listeners.append(listener)

    def _first_hello(self) -> Hello:
        if self._supervisor.hello is None:
            raise Unavailable("the engine has not started yet", reason="ENGINE_STARTING")
        return self._supervisor.hello

    # ------------------------------------------------------------------------------------------ life

    async def start(self) -> Hello:
        """Starts the engine and waits until the base model is loaded. Raises as EngineSupervisor.start does."""
        return await self._supervisor.start()

    async def stop(self, drain_ms: int = 0) -> None:
        """Lets running sequences finish for at most `drain_ms`, then ends the engine. May be called twice."""
        await self._supervisor.stop(drain_ms)

    def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """See Conversation."""
        self._reader, self._writer = reader, writer

    def shut_down(self, drain_ms: int) -> None:
        """See Conversation."""
        self._send(Shutdown(drain_ms=drain_ms))

    def disconnect(self, error: GraftworkServerError) -> None:
        """See Conversation."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
        self.loaded = set()
        streams, self._streams = self._streams, {}
        calls, self._calls = self._calls, {}
        for stream in streams.values():
            stream.fail(error)
        for call in calls.values():
            if not call.done():
                call.set_exception(error)

    def end_streams(self, error: GraftworkServerError) -> None:
        """Ends every running sequence with `error`, here and in the engine."""
        for sequence_id, stream in self._streams.items():
            stream.fail(error)
            self._send(Cancel(id=sequence_id))

    # ------------------------------------------------------------------------------------------ what it says

    async def read_until_lost(self) -> None:
        """See Conversation."""
        assert self._reader is not None
        try:
            while True:
                self._dispatch(engine_decoder.decode(await read_frame(self._reader)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except Exception:
            # A frame that cannot be read leaves the stream without a border: only a new engine helps.
            log.exception("a message of the engine could not be handled")

    def _dispatch(self, message: EngineMessage) -> None:
        match message:
            case StepOutputs():
                for output in message.outputs:
                    if output.finish:
                        self._in_flight.done(output.id)
                    stream = self._streams.get(output.id)
                    if stream is not None:
                        stream.push(output)
            case Reply():
                self._in_flight.done(message.call_id)
                call = self._calls.pop(message.call_id, None)
                if call is not None and not call.done():
                    if message.error is not None:
                        call.set_exception(from_body(message.error))
                    elif message.result is not None:
                        call.set_result(message.result)
            case LoadedChanged():
                self._tell_loaded(set(message.digests))
            case JobEvent():
                self._supervisor.tell(lambda listener: listener.on_job_event(message))
            case _:
                raise ValueError(f"{type(message).__name__} is no message for a running engine")

    def _tell_loaded(self, loaded: set[str]) -> None:
        for digest in loaded - self.loaded:
            log_event(log, "adapter loaded", adapter=self._names.get(digest), digest=digest[:SHOWN_DIGEST])
        for digest in self.loaded - loaded:
            log_event(log, "adapter unloaded", adapter=self._names.pop(digest, None), digest=digest[:SHOWN_DIGEST])
        self.loaded = loaded

    def _keep_name(self, adapter: AdapterRef) -> None:
        if len(self._names) >= MAX_NAMES and adapter.digest not in self._names:
            self._names.clear()
        self._names[adapter.digest] = adapter.name

    # ------------------------------------------------------------------------------------------ what it is told

    def _send(self, message: Any) -> None:
        if self._writer is None:
            raise engine_restarting()
        self._writer.write(encode_frame(message))

    def _begin(self, id: int, message: Any) -> None:
        """Sends what is answered. Raises FailedPrecondition (ENGINE_DIED_BEFORE) for what engines died under."""
        self._in_flight.check(message, self.loaded)
        self._send(message)
        self._in_flight.begin(id, message)

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        adapter: AdapterRef | None = None,
        prompt_logprobs: int | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        pool: Pool | None = None,
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Outputs of one sequence, several steps' worth in one if the reader is slower than the engine.

        Ends after the output that has a finish reason. Closing or cancelling it ends the sequence in the engine.
        Raises the sequence's own error, Unavailable when the engine dies, ResourceExhausted (SLOW_CONSUMER) when more
        than a bounded amount waits for the reader.
        """
        if adapter is not None:
            self._keep_name(adapter)
        sequence_id = self._take_id()
        message = Generate(
            id=sequence_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            adapter=adapter,
            prompt_logprobs=prompt_logprobs,
            cache_salt=cache_salt,
            priority=priority,
            pool=pool,
        )
        self._begin(sequence_id, message)
        stream = self._streams[sequence_id] = OutputStream()
        try:
            while not stream.ended:
                yield await stream.next()
        finally:
            self._streams.pop(sequence_id, None)
            self._in_flight.leave(sequence_id)
            if not stream.ended and self._writer is not None:
                self._send(Cancel(id=sequence_id))

    async def pool(self, token_ids: list[int], pool: Pool, adapter: AdapterRef | None = None) -> Pooled:
        """One vector, or the logits of a head, for a sequence. Errors and cancelling are as in generate."""
        async with aclosing(self.generate(token_ids, Sampling(max_tokens=0), adapter, pool=pool)) as outputs:
            async for output in outputs:
                if output.pooled is not None:
                    return output.pooled
        raise Internal("the engine ended a sequence without what was asked for", reason="ENGINE_PROTOCOL")

    async def _call(self, message_type: Any, result_type: type[Any], **fields: Any) -> Any:
        call_id = self._take_id()
        message = message_type(call_id=call_id, **fields)
        self._begin(call_id, message)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            result = await future
        finally:
            self._calls.pop(call_id, None)
        if not isinstance(result, result_type):
            raise Internal("the engine gave an answer of another kind", reason="ENGINE_PROTOCOL")
        return result

    async def prepare_job(
        self, strategy: str, config: dict[str, Any], row_count: int, total_tokens: int, held_out_rows: int = 0
    ) -> PreparedJob:
        """Checks a job's configuration, completes and estimates it; raises InvalidArgument with the keys that are
        wrong."""
        result: PreparedJob = await self._call(
            PrepareJob,
            PreparedJob,
            strategy=strategy,
            config=config,
            row_count=row_count,
            total_tokens=total_tokens,
            held_out_rows=held_out_rows,
        )
        return result

    async def start_job(self, job: TunerTask) -> int:
        """Starts a tuner and returns its process id; its events go to the listeners."""
        result: Started = await self._call(StartJob, Started, job=job)
        return result.pid

    async def stop_job(self, job_id: str) -> bool:
        """Ends a tuner; true if it ran. No event of the job follows."""
        result: Stopped = await self._call(StopJob, Stopped, job_id=job_id)
        return result.was_running

    async def load(self, adapter: AdapterRef) -> LoadReport:
        """Loads an adapter beside the base, if it is not there yet."""
        self._keep_name(adapter)
        result: LoadReply = await self._call(Load, LoadReply, adapter=adapter)
        return result.report

    async def unload(self, digest: str) -> bool:
        """Unloads an adapter once no sequence uses it; true if it was loaded."""
        result: Unloaded = await self._call(Unload, Unloaded, digest=digest)
        return result.was_loaded

    async def pin(self, digests: Collection[str]) -> None:
        """From now on the engine evicts none of these, and no longer keeps others that it was told to."""
        await self._call(Pin, Pinned, digests=sorted(digests))

    async def inspect(self, path: str, strategy: str | None = None, content: str = "") -> ArtifactInfo:
        """Reads an artifact and checks it against the base without loading it; `content` names what its files hold."""
        result: InspectReply = await self._call(Inspect, InspectReply, path=path, strategy=strategy, content=content)
        return result.info
