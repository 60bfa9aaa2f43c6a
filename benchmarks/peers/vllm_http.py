"""vLLM's OpenAI server, driven over HTTP; run with the python of vLLM's own environment.

    python vllm_http.py MODEL_DIR ADAPTERS_DIR DTYPE THREADS NAMES AT_ONCE WORK

NAMES are the adapters that will be asked for, separated by commas; AT_ONCE is the most requests that run together. The
base alone is measured on a server without LoRA, which is vLLM's best case. There is one more server for each greatest
rank, with as many LoRA places as requests can use at once. Servers listen on free loopback ports; they start with the
first job that needs them, and end with this process. Their output is in WORK/vllm-*.log.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
from line_worker import Job, Measured, answer_lines, gaps_ms, with_new_tokens
from pausing import pause

START_SECONDS = 300
KV_GIB = "2"
PR_SET_PDEATHSIG = 1


class VllmServer:
    """`vllm serve`; lora_rank 0 serves the base without LoRA. Ends with this process, however that ends."""

    def __init__(
        self, model_dir: str, adapters_dir: str, dtype: str, threads: int, names: list[str], places: int, log: Path
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [str(Path(sys.executable).parent / "vllm"), "serve", model_dir, "--served-model-name", "base"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "2048"]
        command += ["--no-enable-prefix-caching", "--disable-log-stats"]
        if names:
            command += ["--enable-lora", "--max-loras", str(min(places, len(names))), "--max-cpu-loras", "128"]
            command += ["--max-lora-rank", str(max(rank_of(name) for name in names)), "--lora-modules"]
            command += [f"{name}={adapters_dir}/{name}" for name in names]
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": KV_GIB,
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        environment.pop("OMP_NUM_THREADS", None)
        self._log = log
        libc = ctypes.CDLL(None)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    async def wait_ready(self, session: aiohttp.ClientSession) -> None:
        """Raises RuntimeError if it ends or does not answer within START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{self.url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
        raise RuntimeError(f"vLLM did not start; see {self._log}")

    def pause(self, still: bool) -> None:
        """Makes the server and its engine stand still, or go on."""
        pause([self._process.pid], still)

    def close(self) -> None:
        """Ends the server and its engine."""
        self.pause(False)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Vllm:
    """Servers by greatest rank, 0 for the one without LoRA."""

    def __init__(self, model_dir: str, adapters_dir: str, dtype: str, threads: int, names: str, at_once: int) -> None:
        self._settings = (model_dir, adapters_dir, dtype, threads)
        self._names = [name for name in names.split(",") if name]
        self._at_once = at_once
        self._work = Path(sys.argv[7])
        self._servers: dict[int, VllmServer] = {}

    def measure(self, job: Job) -> Measured:
        """Warms up with two tokens a request, then sends the job's requests, at_once at a time."""
        return asyncio.run(self._measure(job))

    def close(self) -> None:
        """Ends all servers."""
        for server in self._servers.values():
            server.close()

    async def _measure(self, job: Job) -> Measured:
        limits = aiohttp.ClientTimeout(600)
        async with aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session:
            server = await self._server(job, session)
            await load(session, server.url, with_new_tokens(job, 2))
            return await load(session, server.url, job)

    async def _server(self, job: Job, session: aiohttp.ClientSession) -> VllmServer:
        rank = max((rank_of(name) for name in job["adapters"] if name is not None), default=0)
        if rank not in self._servers:
            names = [name for name in self._names if rank_of(name) <= rank]
            log = self._work / f"vllm-rank{rank}.log"
            self._servers[rank] = VllmServer(*self._settings, names, self._at_once, log)
        # One that waits takes some of a core from the one that works.
        for other, server in self._servers.items():
            server.pause(other != rank)
        await self._servers[rank].wait_ready(session)
        return self._servers[rank]


async def load(session: aiohttp.ClientSession, url: str, job: Job) -> Measured:
    """Closed-loop load: at_once places, each takes the next request when its last one has ended."""
    places = asyncio.Semaphore(job["at_once"])
    first: list[float] = []
    gaps: list[float] = []

    async def one(prompt: list[int], adapter: str | None) -> None:
        body = {"model": adapter or "base", "prompt": prompt, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"max_tokens": job["new_tokens"], "min_tokens": job["new_tokens"]}
        body |= {"stream_options": {"include_usage": True}}
        async with places:
            sent = time.perf_counter()
            times: list[float] = []
            produced = 0
            async with session.post(f"{url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise RuntimeError(await response.text())
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    # Parsed only where it matters: the client shares its cores with the server.
                    if b'"usage":{' in line:
                        produced = json.loads(line[6:])["usage"]["completion_tokens"]
                    else:
                        times.append(time.perf_counter())
        if produced != job["new_tokens"]:
            raise RuntimeError(f"vLLM answered {produced} tokens instead of {job['new_tokens']}")
        first.append((times[0] - sent) * 1000)
        gaps.extend(gaps_ms(times))

    started = time.perf_counter()
    await asyncio.gather(*(one(*pair) for pair in zip(job["prompts"], job["adapters"], strict=True)))
    return {"seconds": time.perf_counter() - started, "first_ms": first, "gaps_ms": gaps}


def rank_of(name: str) -> int:
    """Adapters are named after rank and number, such as r16-3."""
    return int(name[1:].partition("-")[0])


def main() -> None:
    """Answers jobs from stdin."""
    model_dir, adapters_dir, dtype, threads, names, at_once, _ = sys.argv[1:]
    vllm = Vllm(model_dir, adapters_dir, dtype, int(threads), names, int(at_once))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        answer_lines(vllm.measure, ["vllm", "torch"])
    finally:
        vllm.close()


if __name__ == "__main__":
    main()
