"""A real engine process that speaks the real protocol (scripted_engine.py), without a model, and its client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path

import pytest
from tests.server import scripted_engine as script

from graftwork_server.front import engine_supervisor
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.types import AdapterRef
from graftwork_server.wire.engine import Sampling
from graftwork_server.wire.tuning import JobEvent

COMMAND = (sys.executable, script.__file__)


ADAPTER = AdapterRef(digest="sha256:aa", path="unused", strategy="lora")


class Recorder:
    """A listener that notes everything."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.events: list[JobEvent] = []

    def on_engine_ready(self) -> None:
        self.calls.append("ready")

    def on_engine_lost(self) -> None:
        self.calls.append("lost")

    def on_job_event(self, event: JobEvent) -> None:
        self.events.append(event)


@pytest.fixture
def options(tmp_path):
    """Writes the script's options; returns the settings for an EngineClient. Call it again to change them."""

    def write(**values) -> dict:
        path = tmp_path / "scripted"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({"log": str(tmp_path / "log"), **values}))
        return {"model": str(path)}

    return write


@pytest.fixture
async def engine(options):
    client = EngineClient(options(), command=COMMAND)
    client.add_listener(Recorder())
    await client.start()
    yield client
    await client.stop()


@pytest.fixture(autouse=True)
def fast_restarts(monkeypatch):
    monkeypatch.setattr(engine_supervisor, "FIRST_BACKOFF_SECONDS", 0.02)


def heard(tmp_path: Path, kind: str) -> list[dict]:
    """Messages of this kind that the engine got."""
    with contextlib.suppress(FileNotFoundError):
        return [e for e in map(json.loads, (tmp_path / "log").read_text().splitlines()) if e["type"] == kind]
    return []


async def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.005)


async def collect(stream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


def sampling(max_tokens: int = 4, **fields) -> Sampling:
    return Sampling(max_tokens=max_tokens, **fields)


def artifact(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(text)
    return str(folder)
