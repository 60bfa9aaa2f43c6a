"""The engine alone: `Engine.step` in a loop, without front, socket or gRPC. A side for benchmarks/front.py.

python -m benchmarks.common.engine_in_process MODEL_DIR DTYPE THREADS
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmarks.peers.line_worker import Job, Measured, answer_lines, with_new_tokens

from graftwork_server.base.device import choose_dtype
from graftwork_server.config import ServerConfig
from graftwork_server.engine.engine import Engine
from graftwork_server.layers.models.causal import load_base
from graftwork_server.wire.engine import Generate, Sampling


class InProcess:
    """An engine with the server's default limits."""

    def __init__(self, model_dir: str, dtype: str) -> None:
        device = torch.device("cpu")
        with tempfile.TemporaryDirectory() as cache:
            base = load_base(model_dir, device, choose_dtype(dtype, device), Path(cache))
        self._engine = Engine(base, ServerConfig.model_validate({"prefix_cache": False}), lambda adapter: None)
        self._ids = itertools.count(1)

    def measure(self, job: Job) -> Measured:
        """All requests of the job at once; those of the base only."""
        self._run(with_new_tokens(job, 2))
        return self._run(job)

    def _run(self, job: Job) -> Measured:
        sampling = Sampling(max_tokens=job["new_tokens"], ignore_eos=True)
        started = time.perf_counter()
        for prompt in job["prompts"]:
            self._engine.add(Generate(id=next(self._ids), prompt_ids=prompt, sampling=sampling))
        first: dict[int, float] = {}
        while self._engine.active:
            for output in self._engine.step():
                first.setdefault(output.id, (time.perf_counter() - started) * 1000)
        return {"seconds": time.perf_counter() - started, "first_ms": list(first.values()), "gaps_ms": []}


def main() -> None:
    """Answers jobs from stdin."""
    model_dir, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answer_lines(InProcess(model_dir, dtype).measure, ["torch"])


if __name__ == "__main__":
    main()
