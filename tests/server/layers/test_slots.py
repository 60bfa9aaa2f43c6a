"""The adapter pool: budget, leases, eviction, draining, and answers that stay right through all of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import toys
from tests.server.engine.harness import Harness, Reference, assert_greedy_matches, deltas_of

from graftwork_plugins import FullWeights, LowRank, Replace, Scale
from graftwork_server.errors import FailedPrecondition, ResourceExhausted
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.base_model import BaseModel, unwrapped_state
from graftwork_server.types import AdapterRef

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapters(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    ranks = [8, 8, 4, 8]
    return [toys.make_adapter(llama_dir, folder / f"a{seed}", seed, r=rank) for seed, rank in enumerate(ranks)]


def test_evicts_the_least_recently_used_and_never_a_leased_one(
    llama_dir: Path, llama: BaseModel, adapters: list[Path]
) -> None:
    size = bind(llama, "x", deltas_of(adapters[0])).device_bytes
    pool = Harness(llama_dir, llama, adapter_memory_bytes=2 * size).engine.adapters
    stop = threading.Event()
    first, second = (pool.place(bind(llama, f"d{i}", deltas_of(adapters[i])), 0.0, stop) for i in (0, 1))
    pool.release(second)
    third = pool.place(bind(llama, "d3", deltas_of(adapters[3])), 0.0, stop)
    assert pool.digests() == ["d0", "d3"]
    assert pool.used_bytes == 2 * size

    placed: list[object] = []
    waiter = threading.Thread(
        target=lambda: placed.append(pool.place(bind(llama, "d1", deltas_of(adapters[1])), 0.0, stop))
    )
    waiter.start()
    deadline = time.monotonic() + 30
    while not pool._waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool._waiting, "both places are leased: the third load must wait"
    assert not placed
    pool.release(first)
    waiter.join(30)
    assert placed
    assert pool.digests() == ["d3", "d1"]
    assert third.leases == 1


def test_an_adapter_larger_than_the_pool_is_refused(llama_dir: Path, llama: BaseModel, adapters: list[Path]) -> None:
    pool = Harness(llama_dir, llama, adapter_memory_bytes=1000).engine.adapters
    with pytest.raises(ResourceExhausted, match="adapter-memory-bytes"):
        pool.place(bind(llama, "d", deltas_of(adapters[0])), 0.0, threading.Event())


def test_unload_drains_and_gives_memory_back(llama_dir: Path, llama: BaseModel, adapters: list[Path]) -> None:
    harness = Harness(llama_dir, llama)
    pool = harness.engine.adapters
    ref = harness.place("d0", deltas_of(adapters[0]))
    harness.add(1, [5, 6, 7], ref, max_tokens=5)
    harness.step()
    assert pool.unload("d0")
    assert pool.lease("d0") is None, "nobody gets a new lease while it drains"
    assert pool.digests() == ["d0"]
    harness.add(2, [5, 6, 7], ref)
    harness.step()
    assert harness.load_requests, "the new request asks for a fresh load"
    while 1 not in harness.finished:
        harness.step()
    assert pool.digests() == []
    assert pool.used_bytes == 0
    assert not pool.slots.blocks
    assert not pool.unload("d0")


def test_answers_after_eviction_and_reload_are_the_same(
    llama_dir: Path, llama: BaseModel, adapters: list[Path]
) -> None:
    size = bind(llama, "x", deltas_of(adapters[0])).device_bytes
    harness = Harness(llama_dir, llama, adapter_memory_bytes=2 * size)
    names = {f"a{index}": path for index, path in enumerate(adapters)}
    reference = Reference(llama_dir, names)
    prompt = toys.prompts(1, seed=4)[0]
    for round_number in range(2):
        for index, path in enumerate(adapters):
            if harness.engine.adapters.report(f"d{index}") is None:
                harness.place(f"d{index}", deltas_of(path))
            request = 10 * round_number + index
            harness.add(request, prompt, AdapterRef(digest=f"d{index}", path="", strategy="lora"))
            harness.add(100 + request, prompt)
            harness.run()
            assert_greedy_matches(harness, reference, request, prompt, f"a{index}")
            assert_greedy_matches(harness, reference, 100 + request, prompt, None)


def test_a_tuned_checkpoint_runs_beside_base_and_adapters(
    llama_dir: Path, llama: BaseModel, adapters: list[Path]
) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(llama_dir / "model.safetensors").items()}
    changed = [name for name in state if "layers.1.self_attn" in name]
    for name in changed:
        state[name] += torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1)) * 0.1
    harness = Harness(llama_dir, llama)
    prepared = bind(llama, "full", [FullWeights(tensors=state)])
    assert prepared.device_bytes == sum(state[name].nbytes for name in changed), "equal tensors are not held twice"
    full = harness.place("full", [FullWeights(tensors=state)])
    ref = harness.place("d0", deltas_of(adapters[0]))
    prompt = toys.prompts(1, seed=6)[0]
    for request, adapter in enumerate((full, ref, None, full)):
        harness.add(request, prompt, adapter)
    assert len(harness.step()) == 4, "one step answers all of them"
    harness.run()
    reference = Reference(llama_dir, {"a0": adapters[0]})
    assert_greedy_matches(harness, reference, 1, prompt, "a0")
    assert_greedy_matches(harness, reference, 2, prompt, None)
    plain = Reference(llama_dir, {})
    plain.model.load_state_dict(state, strict=False)
    assert_greedy_matches(harness, plain, 0, prompt, None)
    assert harness.tokens[3] == harness.tokens[0]
    base_state = unwrapped_state(llama)
    original = load_file(llama_dir / "model.safetensors")
    assert all(torch.equal(base_state[name], original[name]) for name in changed), "the base is untouched"


def low_rank(**changes: object) -> LowRank:
    values: dict[str, object] = {"module": MODULE, "a": torch.ones(2, 48), "b": torch.ones(48, 2), "scaling": 1.0}
    return LowRank(**(values | changes))  # type: ignore[arg-type]


def replace(**changes: object) -> Replace:
    values: dict[str, object] = {"module": MODULE, "tensors": {"weight": torch.ones(48, 48)}}
    return Replace(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("deltas", "says"),
    [
        ([], "no tensors"),
        ([low_rank(module="model.layers.9.mlp.up_proj")], "no module model.layers.9.mlp.up_proj"),
        ([low_rank(a=torch.ones(2, 47))], r"A is \[2, 47\].*\[rank, 48\]"),
        ([low_rank(b=torch.ones(48, 3))], r"B is \[48, 3\]"),
        ([low_rank(a=torch.full((2, 48), float("nan")))], "A holds NaN"),
        ([low_rank(b=torch.full((48, 2), float("inf")))], "B holds NaN or infinite"),
        ([low_rank(a=torch.ones(2, 48, dtype=torch.int64))], "floating point is accepted"),
        ([low_rank(scaling=float("nan"))], "scaling"),
        ([low_rank(), low_rank()], "two deltas"),
        ([low_rank(magnitude=torch.ones(47))], r"magnitude is \[47\]; this base takes \[48\]"),
        ([low_rank(bias=torch.full((48,), float("nan")))], "bias holds NaN"),
        ([low_rank(), Scale(module=MODULE, factors=torch.ones(48), of="input")], "scaled input and another delta"),
        ([Scale(module=MODULE, factors=torch.ones(47), of="output")], r"factors is \[47\]"),
        ([Scale(module="model.norm", factors=torch.ones(48), of="output")], "is a LlamaRMSNorm"),
        ([Scale(module="model.embed_tokens", factors=torch.ones(48), of="output")], "is an embedding"),
        ([low_rank(), replace()], "both a low-rank update and a weight of its own"),
        ([replace(), replace()], "two deltas of the kind Replace"),
        ([replace(tensors={"weight": torch.ones(48, 47)})], r"is \[48, 47\]; this base takes \[48, 48\]"),
        ([replace(tensors={"bias": torch.ones(48)})], "has no bias; it has weight"),
        ([replace(tensors={"weight": torch.full((48, 48), float("inf"))})], "weight holds NaN or infinite"),
        ([replace(module="model.layers.0")], "which cannot be changed for some rows alone"),
        ([replace(tensors={"weight": torch.ones(1, 48)}, rows=[48])], "from 0 to 47"),
        ([replace(tensors={"weight": torch.ones(2, 48)}, rows=[3, 3])], "must be different"),
        ([replace(copy_of_base=True)], "differs from this base's"),
        ([FullWeights(tensors={}), low_rank()], "cannot be combined"),
        ([FullWeights(tensors={})], "lacks"),
        ([FullWeights(tensors={"x": torch.ones(1)})], "no tensor x"),
    ],
)
def test_deltas_that_do_not_fit_are_refused_by_name(llama: BaseModel, deltas: list[LowRank], says: str) -> None:
    with pytest.raises(FailedPrecondition, match=says) as raised:
        bind(llama, "d", deltas, place=False)
    assert raised.value.reason == "ARTIFACT_REJECTED"
    assert raised.value.violations


def test_a_failed_load_ends_only_its_own_requests(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama)
    harness.add(1, [5, 6], AdapterRef(digest="missing", path="", strategy="lora"))
    harness.add(2, [5, 6])
    harness.step()
    failed = harness.engine.fail_waiting("missing", FailedPrecondition("no", reason="ARTIFACT_REJECTED").body())
    assert [output.id for output in failed] == [1]
    harness.run()
    assert len(harness.tokens[2]) == 12
