"""llama.cpp in process, through llama-cpp-python's low-level interface; run in its own environment (with gguf, torch).

    python llama_cpp_run.py MODEL_DIR ADAPTERS_DIR THREADS

A llama.cpp batch carries one set of adapters. So requests of the same adapter run together in one batch, and one
adapter's requests after another's, which is what its server does too. There is no server and no text here: its best
case. Model and adapters are converted once, beside the model.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from line_worker import Job, Measured, answer_lines, gaps_ms, with_new_tokens
from llama_cpp import llama_cpp
from to_gguf import convert_adapter, convert_model

BATCH_TOKENS = 2048


class LlamaCpp:
    """One model; adapters are loaded when a job first names them, outside of what is timed."""

    def __init__(self, model_dir: Path, adapters_dir: Path, threads: int) -> None:
        self._model_dir, self._adapters_dir, self._threads = model_dir, adapters_dir, threads
        self._folder = model_dir.parent / f"{model_dir.name}-gguf"
        self._folder.mkdir(exist_ok=True)
        # llama.cpp tells much about each context; errors are raised here instead.
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        file = self._folder / "model.gguf"
        if not file.is_file():
            convert_model(model_dir, file)
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._adapters: dict[str, Any] = {}

    def measure(self, job: Job) -> Measured:
        """Runs the job's requests in windows of at_once."""
        for name in {name for name in job["adapters"] if name is not None}:
            self._load(name)
        context = self._context(job)
        try:
            self._run(context, with_new_tokens(job, 2))
            return self._run(context, job)
        finally:
            llama_cpp.llama_free(context)

    def _load(self, name: str) -> None:
        if name in self._adapters:
            return
        file = self._folder / f"{name}.gguf"
        if not file.is_file():
            convert_adapter(self._adapters_dir / name, self._model_dir, file)
        self._adapters[name] = llama_cpp.llama_adapter_lora_init(self._model, str(file).encode())
        if not self._adapters[name]:
            raise RuntimeError(f"llama.cpp cannot load {file}")

    def _context(self, job: Job) -> Any:
        length = len(job["prompts"][0]) + job["new_tokens"]
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = job["at_once"]
        settings.n_ctx = job["at_once"] * (-(-length // 256) * 256)
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS  # faster here than the default of 512 at a time
        settings.n_threads = settings.n_threads_batch = self._threads
        context = llama_cpp.llama_init_from_model(self._model, settings)
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        return context

    def _run(self, context: Any, job: Job) -> Measured:
        started = time.perf_counter()
        first: list[float] = []
        gaps: list[float] = []
        for begin in range(0, len(job["prompts"]), job["at_once"]):
            sent = time.perf_counter()
            window = range(begin, min(begin + job["at_once"], len(job["prompts"])))
            for name in dict.fromkeys(job["adapters"][index] for index in window):
                self._use(context, name)
                prompts = [job["prompts"][index] for index in window if job["adapters"][index] == name]
                times = self._generate(context, prompts, job["new_tokens"])
                first += [(times[0] - sent) * 1000] * len(prompts)
                gaps += gaps_ms(times) * len(prompts)
        return {"seconds": time.perf_counter() - started, "first_ms": first, "gaps_ms": gaps}

    def _use(self, context: Any, name: str | None) -> None:
        if name is None:
            code = llama_cpp.llama_set_adapters_lora(context, None, 0, None)
        else:
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapters[name])
            code = llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
        if code != 0:
            raise RuntimeError(f"llama.cpp does not take adapter {name}")

    def _generate(self, context: Any, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Greedy decoding of all prompts in one batch; when each step's tokens were there, in seconds."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        length = len(prompts[0])
        tokens = self._prefill(context, prompts)
        times = [time.perf_counter()]
        for step in range(new_tokens - 1):
            tokens = self._decode(context, [(token, length + step, row, True) for row, token in enumerate(tokens)])
            times.append(time.perf_counter())
        return times

    def _prefill(self, context: Any, prompts: list[list[int]]) -> list[int]:
        """The first new token of every prompt; as many prompts in one batch as it has room for."""
        together = max(1, BATCH_TOKENS // len(prompts[0]))
        tokens: list[int] = []
        for begin in range(0, len(prompts), together):
            rows = range(begin, min(begin + together, len(prompts)))
            last = len(prompts[0]) - 1
            entries = [(id, at, row, at == last) for row in rows for at, id in enumerate(prompts[row])]
            tokens += self._decode(context, entries)
        return tokens

    def _decode(self, context: Any, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """The most likely next token after each entry that asks for it. entries: (token, position, sequence, ask)."""
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, ask) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = ask
        code = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        asked = [index for index, entry in enumerate(entries) if entry[3]]
        return [self._most_likely(llama_cpp.llama_get_logits_ith(context, index)) for index in asked]

    def _most_likely(self, logits: Any) -> int:
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def main() -> None:
    """Answers jobs from stdin."""
    model_dir, adapters_dir, threads = sys.argv[1:]
    engine = LlamaCpp(Path(model_dir), Path(adapters_dir), int(threads))
    answer_lines(engine.measure, ["llama_cpp_python"])


if __name__ == "__main__":
    main()
