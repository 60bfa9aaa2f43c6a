"""Pinned adapters: the registry remembers them, each engine is told of them and loads them before anybody asks."""

from __future__ import annotations

import asyncio
import logging

from graftwork_server.errors import GraftworkServerError
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.hub.hub import Hub
from graftwork_server.wire.tuning import JobEvent

log = logging.getLogger("graftwork.adapters")


class Pins:
    """Keeps the engine's pins as the registry has them. An EngineListener."""

    def __init__(self, engine: EngineClient, hub: Hub) -> None:
        self._engine = engine
        self._hub = hub
        self._telling = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None

    async def tell(self) -> None:
        """Tells the engine what is pinned now; after every change."""
        async with self._telling:  # what was read first must not be said last
            pinned = await asyncio.to_thread(self._hub.registry.pinned_versions)
            await self._engine.pin({version.digest for version in pinned})

    def on_engine_ready(self) -> None:
        """A new engine has nothing loaded. It serves while the pinned ones are loaded one after another."""
        self.stop()
        self._loading = asyncio.create_task(self._load_all(), name="load-pinned")

    def on_engine_lost(self) -> None:
        """See EngineListener."""
        self.stop()

    def on_job_event(self, event: JobEvent) -> None:
        """See EngineListener."""

    def stop(self) -> None:
        """Loads no more."""
        if self._loading is not None:
            self._loading.cancel()

    async def _load_all(self) -> None:
        try:
            await self.tell()
        except GraftworkServerError as error:
            log.warning("pinned adapters could not be announced to the engine: %s", error.message)
            return
        for version in await asyncio.to_thread(self._hub.registry.pinned_versions):
            try:
                resolved = self._hub.resolver.resolved(version)
                async with self._hub.leases.hold(resolved):
                    await self._engine.load(self._hub.resolver.adapter_ref(version))
            except GraftworkServerError as error:
                log.warning("pinned %s could not be loaded: %s", version.name, error.message)
