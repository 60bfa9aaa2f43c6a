"""transformers + PEFT: `generate` on a batch, with adapter_names where adapters are mixed.

    python peft_generate.py MODEL_DIR ADAPTERS_DIR DTYPE THREADS

All prompts of a job are equally long, so its batches have no padding: PEFT's best case. Tokens are not turned into
text. Adapters are float32 beside a bfloat16 base: PEFT's default, and faster than bfloat16 ones.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from line_worker import Job, Measured, answer_lines, gaps_ms, with_new_tokens
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """When each token of the batch came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each step's tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


class Peft:
    """One model; adapters are loaded when a job first names them, outside of what is timed."""

    def __init__(self, model_dir: Path, adapters_dir: Path, dtype: torch.dtype) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        self._adapters_dir = adapters_dir
        self._loaded: set[str] = set()

    def measure(self, job: Job) -> Measured:
        """Runs the job's requests in batches of at_once."""
        for name in {name for name in job["adapters"] if name is not None}:
            self._load(name)
        self._run(with_new_tokens(job, 2))
        return self._run(job)

    def _load(self, name: str) -> None:
        if name in self._loaded:
            return
        if self._loaded:
            self._model.load_adapter(self._adapters_dir / name, adapter_name=name)
        else:
            self._model = PeftModel.from_pretrained(self._model, self._adapters_dir / name, adapter_name=name)
        self._loaded.add(name)
        self._model.eval()

    def _run(self, job: Job) -> Measured:
        started = time.perf_counter()
        first: list[float] = []
        gaps: list[float] = []
        for begin in range(0, len(job["prompts"]), job["at_once"]):
            names = job["adapters"][begin : begin + job["at_once"]]
            sent = time.perf_counter()
            times = self._generate(job["prompts"][begin : begin + job["at_once"]], names, job["new_tokens"])
            first += [(times[0] - sent) * 1000] * len(names)
            gaps += gaps_ms(times) * len(names)
        return {"seconds": time.perf_counter() - started, "first_ms": first, "gaps_ms": gaps}

    def _generate(self, prompts: list[list[int]], names: list[str | None], new_tokens: int) -> list[float]:
        """When each token came, in seconds."""
        ids = torch.tensor(prompts)  # [requests, prompt tokens]
        clock = Clock()
        settings: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "streamer": clock}
        settings |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            if len(set(names)) > 1:
                self._model.generate(adapter_names=names, **settings)
            elif names[0] is not None:
                self._model.set_adapter(names[0])
                self._model.generate(**settings)
            elif isinstance(self._model, PeftModel):
                with self._model.disable_adapter():
                    self._model.generate(**settings)
            else:
                self._model.generate(**settings)
        return clock.times[1:]


def main() -> None:
    """Answers jobs from stdin."""
    model_dir, adapters_dir, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    peft = Peft(Path(model_dir), Path(adapters_dir), getattr(torch, dtype))
    answer_lines(peft.measure, ["transformers", "peft", "torch"])


if __name__ == "__main__":
    main()
