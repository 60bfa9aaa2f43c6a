"""Decode steps as CUDA graphs: the tokens of eager steps, and PEFT's answers, whatever is loaded meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import toys
from tests.server.engine.harness import Harness, Reference, assert_greedy_matches, deltas_of

from graftwork_server.engine.decode_graphs import Captured
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base
from graftwork_server.types import AdapterRef

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
RANKS = (2, 8, 3, 64)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def base(directory: Path) -> BaseModel:
    torch.backends.cuda.matmul.allow_tf32 = False
    return load_base(str(directory), CUDA, torch.float32, directory)


@pytest.fixture(scope="module")
def adapters(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {f"a{rank}": toys.make_adapter(directory, folder / f"a{rank}", rank, r=rank) for rank in RANKS}


def graphs_of(harness: Harness) -> Captured:
    steps = harness.engine._runner._decode_steps
    assert steps is not None
    assert isinstance(steps._compute, Captured)
    return steps._compute


def to_cpu(harness: Harness) -> None:
    """The logits, where the reference's are."""
    for rows in harness.logits.values():
        rows[:] = [row.cpu() for row in rows]


def run_mixed(harness: Harness, adapters: dict[str, Path], requests: int) -> list[str | None]:
    """Requests over all adapters and the base, of different lengths; the adapter's name of each."""
    refs: dict[str | None, AdapterRef | None] = {n: harness.place(n, deltas_of(path)) for n, path in adapters.items()}
    names = [*adapters, None]
    for index, prompt in enumerate(toys.prompts(requests)):
        harness.add(index, prompt, refs.get(names[index % len(names)]), max_tokens=8 + index)
    harness.run()
    to_cpu(harness)
    return [names[index % len(names)] for index in range(requests)]


def test_replayed_steps_give_the_tokens_of_eager_ones_and_of_peft(
    directory: Path, base: BaseModel, adapters: dict[str, Path]
) -> None:
    replayed = Harness(directory, base)
    names = run_mixed(replayed, adapters, 11)
    graphs = graphs_of(replayed)
    assert not graphs._failed
    assert {rows for rows, _ in graphs._graphs} >= {1, 2, 4, 8, 16}
    eager = Harness(directory, base, cuda_graphs="off")
    run_mixed(eager, adapters, 11)
    assert eager.engine._runner._decode_steps is None
    assert replayed.tokens == eager.tokens
    reference = Reference(directory, adapters)
    for index, prompt in enumerate(toys.prompts(11)):
        assert_greedy_matches(replayed, reference, index, prompt, names[index])


@pytest.mark.parametrize("architecture", list(toys.CONFIGS))
def test_every_architecture_is_captured_or_runs_without(architecture: str, tmp_path: Path) -> None:
    directory = toys.make_model(architecture, tmp_path / "model")
    base = load_base(str(directory), CUDA, torch.float32, tmp_path)
    tokens = []
    for cuda_graphs in ("auto", "off"):
        harness = Harness(directory, base, cuda_graphs=cuda_graphs)
        for index, prompt in enumerate(toys.prompts(3)):
            harness.add(index, prompt)
        harness.run()
        tokens.append(harness.tokens)
    assert tokens[0] == tokens[1]


def test_loads_while_sequences_decode(directory: Path, base: BaseModel, adapters: dict[str, Path]) -> None:
    """A thread loads adapters, which evicts others, while graphs are captured and replayed: no answer changes."""
    names = list(adapters)
    size = max(bind(base, "x", deltas_of(path)).device_bytes for path in adapters.values())
    harness = Harness(directory, base, adapter_memory_bytes=3 * size)
    pool = harness.engine.adapters
    held = harness.place("held", deltas_of(adapters["a8"]))
    stop = threading.Event()
    loads: list[str] = []

    def load() -> None:
        while not stop.is_set():
            name = names[len(loads) % len(names)]
            digest = f"{name}-{len(loads)}"
            pool.release(pool.place(bind(base, digest, deltas_of(adapters[name])), time.perf_counter(), stop))
            loads.append(digest)

    prompts = toys.prompts(6)
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, held if index % 2 else None, max_tokens=24)
    harness.step()  # the adapter is leased from here on
    thread = threading.Thread(target=load)
    thread.start()
    try:
        harness.run()
        deadline = time.monotonic() + 60
        while len(loads) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join()
    assert len(loads) >= 8
    reference = Reference(directory, adapters)
    to_cpu(harness)
    for index, prompt in enumerate(prompts):
        assert_greedy_matches(harness, reference, index, prompt, "a8" if index % 2 else None)
    last = loads[-1]
    harness.add(99, prompts[0], AdapterRef(digest=last, path="", strategy="lora"))
    harness.run()
    to_cpu(harness)
    assert_greedy_matches(harness, reference, 99, prompts[0], last.partition("-")[0])


def test_a_forward_that_waits_for_the_device_is_not_captured() -> None:
    x = torch.ones(3, device=CUDA)

    def forward(rows: int, most_ranks: int) -> torch.Tensor:
        return x * float(x.sum())

    captured: Any = Captured(forward, CUDA)
    stream = torch.cuda.current_stream()
    assert captured(1, 0) is None
    assert torch.cuda.current_stream() == stream, "a failed capture must not leave its own stream behind"
    assert captured(1, 0) is None
    assert torch.equal(x + 1, torch.full((3,), 2.0, device=CUDA)), "the device can still be used"
