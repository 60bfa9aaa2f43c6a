"""Continuous batching: who runs when, under budgets of tokens, sequences and cache blocks."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from tests import toys
from tests.server.engine.harness import Harness, Reference, assert_greedy_matches, deltas_of

from graftwork_server.engine_main import check_kv_cache
from graftwork_server.errors import FailedPrecondition
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS, KVCache, LayerShape
from graftwork_server.layers.models.base_model import BaseModel


def kv_bytes(base: BaseModel, blocks: int) -> int:
    return blocks * BLOCK_TOKENS * sum(shape.bytes_per_token(base.dtype) for shape in base.layer_shapes)


def test_a_kv_cache_below_one_context_is_warned_of_or_refused(
    llama_dir: Path, llama: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    def check(blocks: int) -> None:
        harness = Harness(llama_dir, llama, kv_memory_bytes=kv_bytes(llama, blocks))
        check_kv_cache(llama, harness.engine.kv_tokens)

    assert llama.info.context_tokens == 256
    check(16)
    assert caplog.text == ""
    check(8)
    assert f"holds 128 tokens, less than the model's context of 256, which takes {kv_bytes(llama, 16)}" in caplog.text
    with pytest.raises(FailedPrecondition, match=f"--kv-memory-bytes: .* 112 tokens.* {kv_bytes(llama, 8)} bytes"):
        check(7)


def test_requests_join_and_leave_between_steps(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama)
    harness.add(1, [5, 6, 7], max_tokens=30)
    for _ in range(5):
        harness.step()
    harness.add(2, [8, 9], max_tokens=3)
    for _ in range(4):
        harness.step()
    assert harness.finished[2].finish == "length"
    assert 1 not in harness.finished
    assert len(harness.tokens[1]) == 9
    harness.run()
    assert len(harness.tokens[1]) == 30


def test_one_step_answers_every_adapter(llama_dir: Path, llama: BaseModel, tmp_path: Path) -> None:
    harness = Harness(llama_dir, llama)
    refs = [
        harness.place(f"d{seed}", deltas_of(toys.make_adapter(llama_dir, tmp_path / str(seed), seed)))
        for seed in range(3)
    ]
    for index in range(6):
        harness.add(index, [3 + index, 4, 5], refs[index % 3] if index < 5 else None)
    outputs = harness.step()
    assert sorted(output.id for output in outputs) == list(range(6))


def test_long_prompts_are_prefilled_in_chunks_while_others_decode(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama, max_step_tokens=16)
    harness.add(1, [5, 6, 7], max_tokens=40)
    harness.step()
    long_prompt = toys.prompts(8, seed=5)[0] + list(range(3, 103))
    harness.add(2, long_prompt, max_tokens=2)
    before = len(harness.tokens[1])
    steps = 0
    while 2 not in harness.finished:
        harness.step()
        steps += 1
    # 15 tokens of prefill a step beside the one decode, and the decode never missed a step.
    assert steps >= len(long_prompt) // 15
    assert len(harness.tokens[1]) - before == steps
    harness.run()
    assert_greedy_matches(harness, Reference(llama_dir, {}), 2, long_prompt, None)


def test_preemption_recomputes_and_changes_nothing(llama_dir: Path, llama: BaseModel) -> None:
    prompts = toys.prompts(6, seed=2)
    roomy = Harness(llama_dir, llama)
    tight = Harness(llama_dir, llama, kv_memory_bytes=kv_bytes(llama, 12))
    preempted = []
    free = tight.engine._scheduler._free
    tight.engine._scheduler._free = lambda s: (preempted.append(s.id) if s.generated < 40 else None, free(s))[1]  # type: ignore[method-assign, func-returns-value]
    for harness in (roomy, tight):
        for index, prompt in enumerate(prompts):
            harness.add(index, prompt, max_tokens=40)
        harness.run()
    assert preempted, "the cache was not tight enough to preempt anything"
    assert tight.tokens == roomy.tokens
    assert all(len(tokens) == 40 for tokens in tight.tokens.values())
    assert tight.engine.blocks.free_blocks == tight.engine.blocks.num_blocks == 12


def test_a_request_that_can_never_fit_is_refused_and_one_that_just_fits_is_not(
    llama_dir: Path, llama: BaseModel
) -> None:
    harness = Harness(llama_dir, llama, kv_memory_bytes=kv_bytes(llama, 2))
    harness.add(1, [5] * 20, max_tokens=13)
    error = harness.finished[1].error
    assert error is not None
    assert error.reason == "KV_CACHE_TOO_SMALL"
    harness.add(2, [5] * 20, max_tokens=12)
    harness.run()
    assert len(harness.tokens[2]) == 12


def test_cancel_frees_blocks_and_lease(llama_dir: Path, llama: BaseModel, tmp_path: Path) -> None:
    harness = Harness(llama_dir, llama)
    ref = harness.place("d", deltas_of(toys.make_adapter(llama_dir, tmp_path / "a")))
    harness.add(1, [5, 6, 7], ref, max_tokens=100)
    harness.step()
    adapter = harness.engine._scheduler.sequences[1].adapter
    assert adapter is not None
    assert adapter.leases == 1
    harness.engine.cancel(1)
    assert adapter.leases == 0
    assert harness.engine.blocks.free_blocks == harness.engine.blocks.num_blocks
    assert harness.engine.active == 0
    harness.engine.cancel(1)  # a second cancel, or one of an unknown id, is nothing


def test_max_sequences_bounds_what_runs_together(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama, max_sequences=2)
    for index in range(5):
        harness.add(index, [5, 6, 7 + index], max_tokens=4)
    most = 0
    while harness.engine.active:
        most = max(most, len(harness.step()))
    assert most == 2
    assert sorted(harness.finished) == list(range(5))


@pytest.mark.parametrize("max_step_tokens", [1, 7, 1024])
def test_any_budget_gives_the_same_tokens(llama_dir: Path, llama: BaseModel, max_step_tokens: int) -> None:
    harness = Harness(llama_dir, llama, max_step_tokens=max_step_tokens)
    prompt = toys.prompts(3, seed=9)[2]
    harness.add(1, prompt)
    harness.add(2, [4, 5])
    harness.run()
    reference = Reference(llama_dir, {})
    assert_greedy_matches(harness, reference, 1, prompt, None)
    assert_greedy_matches(harness, reference, 2, [4, 5], None)


def test_the_cache_takes_memory_only_where_it_was_written() -> None:
    before = resident_bytes()
    shape = LayerShape(kv_heads=4, key_dim=64, value_dim=64)
    cache = KVCache([shape] * 4, 65536, torch.float32, torch.device("cpu"))  # 8 GiB of rows
    assert cache.keys[0][0, -1].abs().sum() == 0
    assert resident_bytes() - before < 100 * 2**20


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()
