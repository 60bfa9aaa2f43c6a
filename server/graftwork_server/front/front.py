"""The front as one thing: hub, engine, jobs and RPC server, started in order and ended in the reverse one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

from graftwork_server.base.files import local_dir
from graftwork_server.config import ServerConfig
from graftwork_server.errors import GraftworkServerError, Unavailable
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.front.engine_process import ENGINE_COMMAND
from graftwork_server.front.pins import Pins
from graftwork_server.front.rpc.adapters import AdapterService
from graftwork_server.front.rpc.generation.service import GenerationService
from graftwork_server.front.rpc.interceptors import Drain
from graftwork_server.front.rpc.limits import SequenceLimit
from graftwork_server.front.rpc.server import HealthReporter, RpcServer
from graftwork_server.front.rpc.status import ServerService
from graftwork_server.front.rpc.strategies import StrategyService
from graftwork_server.front.rpc.streaming import Uploads
from graftwork_server.front.rpc.tuning import TuningService
from graftwork_server.hub.hub import Hub
from graftwork_server.text import TextProcessor
from graftwork_server.text.strangers.adapter_text import AdapterTexts
from graftwork_server.text.strangers.helper_pool import HelperPool
from graftwork_server.text.strangers.isolated_text import IsolatedTexts
from graftwork_server.tuning.data.check import DatasetChecker
from graftwork_server.tuning.jobs.manager import JobManager
from graftwork_server.types import ModelInfo

log = logging.getLogger("graftwork.server")

BROKEN_OFF_SECONDS = 1.0
"""Time for broken-off and refused calls to tell their clients so."""


class Front:
    """Everything of a server but the engine's own process. Made on the event loop that it is used on."""

    def __init__(self, config: ServerConfig, engine_command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._config = config
        self._drain = Drain()
        self._rpc = RpcServer(config.max_queue, self._drain)
        self._hub: Hub | None = None
        self._jobs: JobManager | None = None
        self._pools: list[HelperPool] = []
        self._pins: Pins | None = None
        self.engine = EngineClient(config.model_dump(), command=engine_command)
        self.sequence_limit = SequenceLimit(config.max_queue)

    async def start(self, address: str) -> str:
        """Starts everything and returns the address with the real port.

        The quick checks come first: a mistyped directory, a taken one and a taken port are known before torch is there.
        Raises ListenError, and GraftworkServerError for the data directory or the model.
        """
        begun = time.monotonic()
        if self._config.model is not None:
            local_dir(self._config.model)
        log.info("starting: opening the data directory %s", self._config.data_dir)
        self._hub = hub = await asyncio.to_thread(_open_hub, self._config.data_dir)
        bound = self._rpc.bind(address)
        log.info(
            "starting: the engine for base '%s' (it imports torch first), to serve on %s", self._config.base_name, bound
        )
        model = (await self.engine.start()).model
        hub.resolver.base_fingerprint = model.fingerprint
        text = await asyncio.to_thread(_tokenizer, model)
        arguments = [str(model.vocab_size), *([model.tokenizer_dir, model.source] if model.tokenizer_dir else [])]
        # Apart, so that no check of a large data set lets a conversation wait.
        self._pools = [HelperPool("the text of prompts and adapters", arguments), HelperPool("data sets", arguments)]
        files = AdapterTexts(text, model.tokenizer_dir, model.vocab_size, source_dir=model.source)
        texts = IsolatedTexts(files, self._pools[0])
        config = self._config
        uploads = Uploads(config.max_uploads, config.max_uploads_per_client, config.upload_idle_seconds)
        checker = DatasetChecker(self._pools[1], model.context_tokens)
        self._jobs = jobs = JobManager(
            hub,
            self.engine,
            model=model,
            strategies=lambda: self.engine.strategies,
            text=text,
            max_concurrent_jobs=self._config.max_concurrent_jobs,
            check=checker.check,
        )
        self._pins = pins = Pins(self.engine, hub)
        self.engine.add_listener(jobs)
        self.engine.add_listener(pins)
        self.engine.add_listener(HealthReporter(self._rpc))
        await self._rpc.start(
            GenerationService(self.engine, hub.resolver, hub.leases, texts, self.sequence_limit),
            AdapterService(self.engine, hub, texts, pins, self._config.max_upload_bytes, uploads),
            TuningService(hub, jobs, checker, self._drain, self._config.max_dataset_bytes, uploads),
            StrategyService(self.engine),
            ServerService(self._config, self.engine, hub, self.sequence_limit),
        )
        pins.on_engine_ready()
        await jobs.start()
        log.info("started after %.1f s; answering on %s", time.monotonic() - begun, bound)
        return bound

    async def drain(self) -> None:
        """Refuses new calls; running ones get drain_seconds, then they are broken off with UNAVAILABLE."""
        if not await self._rpc.drain(self._config.drain_seconds):
            log.warning("%d sequences are broken off", self.engine.running)
            with contextlib.suppress(Unavailable):
                self.engine.end_streams(Unavailable("the server is shutting down", reason="SHUTTING_DOWN"))
            await self._drain.wait_idle(BROKEN_OFF_SECONDS)

    async def stop(self) -> None:
        """Ends everything, whatever of it was started."""
        if self._jobs is not None:
            await self._jobs.stop()
        if self._pins is not None:
            self._pins.stop()
        # Not at once: a call that is just being refused, a watch that was just told, would be CANCELLED instead.
        await self._rpc.stop(BROKEN_OFF_SECONDS)
        await self.engine.stop()
        for pool in self._pools:
            await asyncio.to_thread(pool.close)
        if self._hub is not None:
            await asyncio.to_thread(self._hub.close)


def _open_hub(data_dir: str) -> Hub:
    """The hub of a data directory. Its errors name the directory: they are for the operator, and for no client."""
    try:
        return Hub(data_dir)
    except GraftworkServerError as error:
        raise type(error)(f"--data-dir {data_dir!r}: {error.message}", reason=error.reason) from error


def _tokenizer(model: ModelInfo) -> TextProcessor | None:
    if model.tokenizer_dir is None:
        log.warning("the base model brings no tokenizer: only token ids work")
        return None
    return TextProcessor.from_dir(model.tokenizer_dir)
