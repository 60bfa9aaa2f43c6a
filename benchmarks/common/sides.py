"""The sides that are compared: this server, and the peers in processes of their own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from benchmarks.common.server_process import ServerProcess

from graftwork import AsyncClient

PEERS = Path(__file__).parents[1] / "peers"
JOB_SECONDS = 900
"""A peer that takes longer for one case is ended, and the benchmark with it."""


Measure = Callable[[dict[str, Any]], dict[str, Any]]
"""From a case's job (benchmarks/workloads/cases.py) to what it took."""


class Side(Protocol):
    """One system under test. Answers a case's job with seconds, first_ms per request, and gaps_ms between tokens."""

    versions: dict[str, str]

    @property
    def process_id(self) -> int:
        """Of the process that all of its others descend from."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def measure(self, job: dict[str, Any]) -> dict[str, Any]:
        """Warms up, then takes the time of the job's requests."""


class OurSide:
    """`graftwork serve` in its own processes, and a client in this one; every token is streamed over gRPC."""

    def __init__(self, model_dir: Path, adapters: Sequence[Path], dtype: str, threads: int, *options: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="graftwork-bench-")
        usual = ["--model", str(model_dir), "--data-dir", self._folder.name, "--threads", str(threads)]
        self._server = ServerProcess([*usual, "--dtype", dtype, "--log-level", "warning", *options])
        self._adapters = adapters
        self.versions: dict[str, str] = {}
        self.load_ms: list[float] = []
        """How long each adapter took to load, as the server reports it."""

    @property
    def process_id(self) -> int:
        """Of the server."""
        return self._server.process_id

    @property
    def dtype(self) -> str:
        """What the server chose, where it was told "auto"."""
        return self._server.dtype

    def __enter__(self) -> Self:
        self._server.__enter__()
        asyncio.run(self._upload())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, trace)
        self._folder.cleanup()

    def measure(self, job: dict[str, Any]) -> dict[str, Any]:
        """Warms up with two tokens a request, then sends the job's requests, at_once at a time."""
        return asyncio.run(self._measure(job))

    async def _upload(self) -> None:
        async with AsyncClient(address=self._server.address) as client:
            for adapter in self._adapters:
                await client.adapters.create(adapter.name, adapter)
                report = (await client.adapters.load(adapter.name)).load_report
                assert report is not None
                self.load_ms.append(report.load_ms)

    async def _measure(self, job: dict[str, Any]) -> dict[str, Any]:
        async with AsyncClient(address=self._server.address) as client:
            await load(client, job, min(2, job["new_tokens"]))
            return await load(client, job, job["new_tokens"])


async def load(client: AsyncClient, job: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Closed-loop load: at_once places, each takes the next request when its last one has ended."""
    places = asyncio.Semaphore(job["at_once"])
    first: list[float] = []
    gaps: list[float] = []

    async def one(prompt: list[int], adapter: str | None) -> None:
        async with places:
            sent = before = time.perf_counter()
            produced = 0
            stream = await client.generate(
                adapter or "base", prompt, max_tokens=new_tokens, ignore_eos=True, stream=True, timeout=600
            )
            async for chunk in stream:
                if chunk.token_ids:
                    now = time.perf_counter()
                    (gaps if produced else first).append((now - before) * 1000)
                    before = now
                    produced += len(chunk.token_ids)
        if produced != new_tokens:
            raise RuntimeError(f"{produced} tokens came instead of {new_tokens} after {before - sent:.1f} s")

    started = time.perf_counter()
    await asyncio.gather(*(one(*pair) for pair in zip(job["prompts"], job["adapters"], strict=True)))
    return {"seconds": time.perf_counter() - started, "first_ms": first, "gaps_ms": gaps}


class PeerSide:
    """A side in a process of its own, `command`: a job a line in, a measurement a line out."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._answer()["versions"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def process_id(self) -> int:
        """Of the peer."""
        return self._process.pid

    def measure(self, job: dict[str, Any]) -> dict[str, Any]:
        """Raises RuntimeError if the peer ends, or needs more than JOB_SECONDS."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        watchdog = threading.Timer(JOB_SECONDS, self._process.terminate)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise RuntimeError(f"{' '.join(self._command[:3])} ended with exit code {self._process.wait(60)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def peft_side(model_dir: Path, adapters_dir: Path, dtype: str, threads: int) -> PeerSide:
    """transformers + PEFT, in this project's own environment."""
    arguments = [str(model_dir), str(adapters_dir), dtype, str(threads)]
    return PeerSide([sys.executable, str(PEERS / "peft_generate.py"), *arguments])


def vllm_side(
    environment: Path, model_dir: Path, adapters_dir: Path, dtype: str, threads: int, names: list[str], at_once: int
) -> PeerSide:
    """vLLM's server and its client, in vLLM's environment."""
    model, adapters, work = model_dir.resolve(), adapters_dir.resolve(), model_dir.parent.resolve()
    arguments = [str(model), str(adapters), dtype, str(threads), ",".join(names), str(at_once), str(work)]
    return PeerSide([str(environment / "bin/python"), str(PEERS / "vllm_http.py"), *arguments])


def llama_cpp_side(environment: Path, model_dir: Path, adapters_dir: Path, threads: int) -> PeerSide:
    """llama.cpp, in its environment; its files are always bfloat16."""
    arguments = [str(model_dir), str(adapters_dir), str(threads)]
    return PeerSide([str(environment / "bin/python"), str(PEERS / "llama_cpp_run.py"), *arguments])
