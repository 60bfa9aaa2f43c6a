"""An engine over a toy model, run in the test's own process, that remembers the logits it sampled from."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.e2e.reference import TOLERANCE
from tests.e2e.serving import eventually
from transformers import AutoModelForCausalLM

from graftwork_plugins import LowRank
from graftwork_server.config import ServerConfig
from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.engine.engine import Engine
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.binding.prepared import PreparedAdapter
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base
from graftwork_server.types import AdapterRef
from graftwork_server.wire.engine import Generate, Pool, Sampling, SequenceOutput

CPU = torch.device("cpu")


class Harness:
    """Loads adapters, runs requests to their end, and keeps tokens, finish reasons and logits by request id."""

    def __init__(self, model_dir: Path, base: BaseModel | None = None, **limits: Any) -> None:
        self.base = base or load_base(str(model_dir), CPU, torch.float32, model_dir)
        self.load_requests: list[AdapterRef] = []
        self.engine = Engine(self.base, ServerConfig.model_construct(**limits), self.load_requests.append)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.logits: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.finished: dict[int, SequenceOutput] = {}
        self.prompt_logprobs: dict[int, Any] = {}
        self.cached: dict[int, int] = defaultdict(int)
        self.rows: dict[int, int] = defaultdict(int)
        """By request: tokens that were run, or written if they were virtual."""
        self.steps = 0
        run = self.engine._runner.run

        def recording(chunks: Any) -> Any:
            for chunk in chunks:
                self.rows[chunk.sequence.id] += chunk.count
            results = run(chunks)
            for result in results:
                if result.chunk.samples and result.chunk.sequence.request.pool is None:
                    self.logits[result.chunk.sequence.id].append(result.logits[-1].clone())
            return results

        self.engine._runner.run = recording  # type: ignore[method-assign]

    def place(self, digest: str, deltas: Sequence[Any]) -> AdapterRef:
        """Loads deltas into the pool."""
        prepared = bind(self.base, digest, deltas)
        adapter = self.engine.adapters.place(prepared, time.perf_counter(), threading.Event())
        self.engine.adapters.release(adapter)
        return AdapterRef(digest=digest, path="", strategy="lora")

    def add(
        self,
        request_id: int,
        prompt: list[int],
        adapter: AdapterRef | None = None,
        prompt_logprobs: int | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        **sampling: Any,
    ) -> None:
        """Queues a request."""
        settings = {"max_tokens": 12, "ignore_eos": True} | sampling
        refused = self.engine.add(
            Generate(
                id=request_id,
                prompt_ids=prompt,
                sampling=Sampling(**settings),
                adapter=adapter,
                prompt_logprobs=prompt_logprobs,
                cache_salt=cache_salt,
                priority=priority,
            )
        )
        if refused is not None:
            self.finished[request_id] = refused

    def pool(self, request_id: int, prompt: list[int], adapter: AdapterRef | None = None, **pool: Any) -> None:
        """Queues a request for a vector (kind "embed", the default) or for a head's logits (kind "classify")."""
        refused = self.engine.add(
            Generate(
                id=request_id,
                prompt_ids=prompt,
                sampling=Sampling(max_tokens=0),
                adapter=adapter,
                pool=Pool(**{"kind": "embed", "pooling": "last", "names_head": True} | pool),
            )
        )
        if refused is not None:
            self.finished[request_id] = refused

    def values(self, request_id: int) -> torch.Tensor:
        """The vector or logits that a request ended with."""
        output = self.finished[request_id]
        assert output.pooled is not None, output.error
        return torch.frombuffer(bytearray(output.pooled.values), dtype=torch.float32)

    def step(self) -> list[SequenceOutput]:
        """One step, recorded."""
        outputs = self.engine.step()
        self.steps += 1
        for output in outputs:
            self.tokens[output.id].extend(output.token_ids)
            self.cached[output.id] += output.cached_tokens
            if output.prompt_logprobs is not None:
                self.prompt_logprobs[output.id] = output.prompt_logprobs
            if output.finish:
                self.finished[output.id] = output
        return outputs

    def run(self, limit: int = 2000) -> None:
        """Steps until nothing is left."""
        for _ in range(limit):
            if self.engine.active == 0:
                return
            self.step()
        raise AssertionError(f"{self.engine.active} sequences still there after {limit} steps")


class StepLoader:
    """Loads as the worker does, in threads that wait for room. Between two steps each load goes as far as it can, so
    that steps count."""

    def __init__(self, harness: Harness, prepared: Mapping[str, PreparedAdapter]) -> None:
        self.harness = harness
        self.loads: list[tuple[int, str]] = []
        """Step and digest of each that is done."""
        self._prepared = prepared
        self._threads = ThreadPoolExecutor(4)
        self._under_way: dict[str, Future[LoadedAdapter]] = {}

    def load(self) -> None:
        """Before a step."""
        pool = self.harness.engine.adapters
        for ref in self.harness.load_requests:
            if ref.digest not in self._under_way:
                prepared = self._prepared[ref.digest]
                self._under_way[ref.digest] = self._threads.submit(pool.place, prepared, 0.0, threading.Event())
                self._settle()
        self.harness.load_requests.clear()
        self._settle()
        pool.wanted = self.harness.engine.waited_for()
        for digest in [digest for digest, load in self._under_way.items() if load.done()]:
            self.harness.engine.arrived(self._under_way.pop(digest).result())
            self.loads.append((self.harness.steps, digest))

    def _settle(self) -> None:
        """Until each load is done, or waits and cannot go on."""
        pool = self.harness.engine.adapters

        def settled() -> bool:
            with pool._changed:
                waiting = {record.digest: (record, pool._waiting[:index]) for index, record in enumerate(pool._waiting)}
                return all(
                    load.done()
                    or (
                        digest in waiting
                        and (waiting[digest][0].leaving is not None or not pool._room().is_turn_of(*waiting[digest]))
                    )
                    for digest, load in self._under_way.items()
                )

        eventually(settled, "the loads to wait", 30)


def deltas_of(directory: Path) -> list[LowRank]:
    """LowRank deltas of a PEFT adapter without patterns, read independently of the lora strategy."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    deltas = []
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = a.shape[0]
            scaling = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
            deltas.append(LowRank(module=module, a=a, b=tensors[name.replace("lora_A", "lora_B")], scaling=scaling))
    return deltas


class Reference:
    """transformers and PEFT on the same files."""

    def __init__(self, model_dir: Path, adapters: dict[str, Path]) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.names = list(adapters)
        for name, directory in adapters.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(directory, adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, directory, adapter_name=name)
        self.model.eval()

    def logits(self, token_ids: list[int], adapter: str | None) -> torch.Tensor:
        """[tokens, vocabulary] of the plain forward over the whole sequence."""
        ids = torch.tensor([token_ids])
        with torch.no_grad():
            if adapter is not None:
                self.model.set_adapter(adapter)
            elif isinstance(self.model, PeftModel):
                with self.model.disable_adapter():
                    return self.model(input_ids=ids, use_cache=False).logits[0]
            return self.model(input_ids=ids, use_cache=False).logits[0]


def assert_greedy_matches(
    harness: Harness, reference: Reference, request_id: int, prompt: list[int], adapter: str | None
) -> None:
    """Every sampled token is the reference's most likely one, and its logits are within 1e-4; so each of two may be the
    most likely that are no further apart than both can be off."""
    tokens = harness.tokens[request_id]
    expected = reference.logits(prompt + tokens, adapter)[len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack(harness.logits[request_id]), expected, atol=TOLERANCE, rtol=0)
    of_tokens = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (expected.amax(-1) - of_tokens <= 2 * TOLERANCE).all(), (tokens, expected.argmax(-1).tolist())
