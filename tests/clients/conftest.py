from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from tests.clients.scripted_server import ScriptedServer

import graftwork
from graftwork.transport import retries


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(retries, "LONGEST_BACKOFF_S", 0.05)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    running = ScriptedServer()
    yield running
    running.stop()


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[graftwork.Client]:
    with graftwork.Client(address=server.address, timeout=20) as opened:
        yield opened


@pytest.fixture
async def aclient(server: ScriptedServer) -> AsyncIterator[graftwork.AsyncClient]:
    async with graftwork.AsyncClient(address=server.address, timeout=20) as opened:
        yield opened
