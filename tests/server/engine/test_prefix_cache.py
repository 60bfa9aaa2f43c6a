"""What was computed is found again by those who may find it, and by nobody else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file
from tests import toys
from tests.server.engine.harness import Harness, Reference, assert_greedy_matches, deltas_of

from graftwork_plugins import Artifact, FullWeights, LowRank
from graftwork_plugins.builtin.strategies.prefix import PrefixStrategy
from graftwork_server.base.describe import base_info
from graftwork_server.engine.cache.block_pool import BlockPool, block_key, root_key
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.layers.models.base_model import BaseModel

PROMPT = torch.randint(3, toys.VOCAB, (53,), generator=torch.Generator().manual_seed(3)).tolist()
"""Three full blocks and five tokens."""


def kv_bytes(base: BaseModel, blocks: int) -> int:
    return blocks * BLOCK_TOKENS * sum(shape.bytes_per_token(base.dtype) for shape in base.layer_shapes)


def assert_nothing_is_in_use(blocks: BlockPool) -> None:
    assert not any(blocks._users)
    assert len(blocks._free) + len(blocks._idle) == blocks.num_blocks == blocks.free_blocks
    assert set(blocks._idle) == set(blocks._key_of)
    assert {key: block for block, key in blocks._key_of.items()} == blocks._block_of


@pytest.fixture(scope="module", params=[*toys.CONFIGS, *toys.MIXTURES])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_model(request.param, tmp_path_factory.mktemp(request.param) / "model")


def test_a_b_a_shares_only_with_itself(model_dir: Path) -> None:
    """Adapter A, B, A again, the base; then A under one salt, under another, and under the first again."""
    paths = {name: toys.make_adapter(model_dir, model_dir.parent / name, seed) for seed, name in enumerate("AB")}
    harness = Harness(model_dir)
    refs: dict[str | None, Any] = {name: harness.place(name, deltas_of(path)) for name, path in paths.items()}
    reference = Reference(model_dir, paths)
    course = [("A", ""), ("B", ""), ("A", ""), (None, ""), ("A", "1"), ("A", "2"), ("A", "1"), (None, ""), ("B", "1")]
    first: dict[str | None, list[int]] = {}
    met = set()
    for number, (name, salt) in enumerate(course):
        harness.add(number, PROMPT, refs.get(name), cache_salt=salt)
        harness.run()
        assert harness.cached[number] == (48 if (name, salt) in met else 0), (name, salt)
        assert_greedy_matches(harness, reference, number, PROMPT, name)
        assert harness.tokens[number] == first.setdefault(name, harness.tokens[number])
        met.add((name, salt))
    assert len({tuple(tokens) for tokens in first.values()}) == 3, "all three must have something of their own to say"
    assert_nothing_is_in_use(harness.engine.blocks)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=19),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=33),
    ],
    ids=["prompt", "prefix"],
)
def test_virtual_tokens_belong_to_what_the_digest_says(llama_dir: Path, llama: BaseModel, config: Any) -> None:
    harness = Harness(llama_dir, llama)
    info = base_info(llama.engine_model.model, llama.info)
    refs: list[Any] = [None]
    for seed in (1, 2):
        path = toys.make_peft(llama_dir, llama_dir.parent / f"{config.num_virtual_tokens}-{seed}", config, seed)
        refs.append(harness.place(path.name, PrefixStrategy().load(Artifact(path), info)))
    # The base's prompt looks exactly like the virtual tokens and the prompt after them.
    prompts = [[0] * config.num_virtual_tokens + PROMPT, PROMPT, PROMPT]
    for turn in range(2):
        for which in (1, 0, 2):
            harness.add(10 * turn + which, prompts[which], refs[which])
            harness.run()
    full = (config.num_virtual_tokens + len(PROMPT)) // BLOCK_TOKENS * BLOCK_TOKENS
    assert [harness.cached[number] for number in (0, 1, 2)] == [0, 0, 0]
    assert [harness.cached[number] for number in (11, 12)] == [full - config.num_virtual_tokens] * 2
    assert harness.cached[10] == full
    for which in range(3):
        assert harness.tokens[which] == harness.tokens[10 + which]
        torch.testing.assert_close(
            torch.stack(harness.logits[which]), torch.stack(harness.logits[10 + which]), atol=1e-4, rtol=0
        )
    assert len({tuple(harness.tokens[which]) for which in range(3)}) == 3


def test_a_tuned_checkpoint_and_the_base_share_nothing(llama_dir: Path, llama: BaseModel, tmp_path: Path) -> None:
    state = load_file(toys.make_checkpoint(llama_dir, tmp_path / "full", seed=5) / "model.safetensors")
    harness = Harness(llama_dir, llama)
    full = harness.place("full", [FullWeights(tensors=state)])
    for number, adapter in enumerate((full, None, full, None)):
        harness.add(number, PROMPT, adapter)
        harness.run()
    assert [harness.cached[number] for number in range(4)] == [0, 0, 48, 48]
    tuned = Reference(llama_dir, {})
    tuned.model.load_state_dict(state, strict=False)
    for number in (0, 2):
        assert_greedy_matches(harness, tuned, number, PROMPT, None)
    for number in (1, 3):
        assert_greedy_matches(harness, Reference(llama_dir, {}), number, PROMPT, None)


def test_a_shared_beginning_is_computed_once(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama)
    harness.add(1, PROMPT, max_tokens=20)
    harness.run()
    assert harness.rows[1] == 53 + 19
    harness.add(2, PROMPT[:40] + [9] * 20, max_tokens=1)
    harness.add(3, PROMPT + harness.tokens[1] + [7, 8], max_tokens=1)
    harness.add(4, PROMPT[:48], max_tokens=1)
    harness.run()
    assert harness.rows[2] == 60 - 32, "the third block differs"
    assert harness.rows[3] == 75 - 64, "generated tokens are found too; the last one was never computed"
    assert harness.rows[4] == 48 - 32, "the last token is computed, so that there are logits"
    assert [harness.cached[number] for number in (1, 2, 3, 4)] == [0, 32, 64, 32]
    for number, prompt in ((2, PROMPT[:40] + [9] * 20), (3, PROMPT + harness.tokens[1] + [7, 8]), (4, PROMPT[:48])):
        assert_greedy_matches(harness, Reference(llama_dir, {}), number, prompt, None)


@pytest.mark.parametrize("max_step_tokens", [1024, 20])
def test_sequences_that_begin_together_compute_their_beginning_once(
    llama_dir: Path, llama: BaseModel, max_step_tokens: int
) -> None:
    harness = Harness(llama_dir, llama, max_step_tokens=max_step_tokens)
    for number in range(8):
        harness.add(number, PROMPT, max_tokens=6)
    harness.run()
    assert sum(harness.rows.values()) == 53 + 7 * 5 + 8 * 5
    for number in range(8):
        assert_greedy_matches(harness, Reference(llama_dir, {}), number, PROMPT, None)


def test_scored_prompts_are_computed_whole(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama)
    harness.add(1, PROMPT)
    harness.run()
    harness.add(2, PROMPT, prompt_logprobs=2, max_tokens=0)
    harness.add(3, PROMPT, prompt_logprobs=0, max_tokens=4)
    harness.run()
    assert (harness.rows[2], harness.rows[3]) == (53, 56)
    expected = Reference(llama_dir, {}).logits(PROMPT, None).log_softmax(-1)
    for number in (2, 3):
        logprobs = [entry.logprob for entry in harness.prompt_logprobs[number]]
        assert logprobs[1:] == pytest.approx(
            [expected[position, token].item() for position, token in enumerate(PROMPT[1:])], abs=1e-4
        )
    assert harness.tokens[3] == harness.tokens[1][:4]
    harness.add(4, PROMPT)
    harness.run()
    assert harness.cached[4] == 48


def test_it_can_be_turned_off(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama, prefix_cache=False)
    for number in range(3):
        harness.add(number, PROMPT)
        harness.run()
        assert (harness.rows[number], harness.cached[number]) == (53 + 11, 0)
    assert not harness.engine.blocks._idle
    assert harness.engine.cache_figures == (159, 0)


def test_the_least_recently_used_go_first_and_from_the_end(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama, kv_memory_bytes=kv_bytes(llama, 7))
    others = [[seed] * 40 for seed in (4, 5)]
    for number, prompt in enumerate((PROMPT, others[0], PROMPT, others[1])):  # 4, 3, 4 and 3 blocks of 7
        harness.add(number, prompt, max_tokens=2)
        harness.run()
    assert harness.cached[2] == 48
    # The newest needed one block more than there were free ones: the last one of what was longest unused went.
    for number, (prompt, cached) in enumerate(((PROMPT, 48), (others[1], 32), (others[0], 16)), start=10):
        harness.add(number, prompt, max_tokens=2)
        harness.run()
        assert harness.cached[number] == cached
    harness.add(20, [6] * 100, max_tokens=12)
    harness.run()
    harness.add(21, PROMPT)
    harness.run()
    assert harness.cached[21] == 0, "a sequence that needs the whole cache gets it"
    assert_greedy_matches(harness, Reference(llama_dir, {}), 21, PROMPT, None)
    assert_nothing_is_in_use(harness.engine.blocks)


@pytest.mark.parametrize("max_step_tokens", [1024, 16])
def test_what_was_not_finite_is_found_by_nobody(llama_dir: Path, llama: BaseModel, max_step_tokens: int) -> None:
    harness = Harness(llama_dir, llama, max_step_tokens=max_step_tokens)
    huge = LowRank(module="model.layers.1.mlp.down_proj", a=torch.ones(1, 80), b=torch.full((48, 1), 3e38), scaling=1.0)
    broken = harness.place("broken", [huge])
    harness.add(1, PROMPT, broken)
    harness.add(2, PROMPT, broken)
    harness.add(3, PROMPT)
    harness.add(4, PROMPT, broken, prompt_logprobs=0, max_tokens=0)
    harness.run()
    for number in (1, 2, 4):
        error = harness.finished[number].error
        assert error is not None
        assert error.reason == "LOGITS_NOT_FINITE"
        assert harness.rows[number] <= max_step_tokens
    blocks = harness.engine.blocks
    assert set(blocks._block_of) == {block_key_of(PROMPT, count) for count in (1, 2, 3)} | {
        block_key_of(PROMPT + harness.tokens[3], 4)
    }
    cache = harness.engine._runner._cache
    assert all(torch.isfinite(tensor).all() for tensor in (*cache.keys, *cache.values))
    assert_nothing_is_in_use(blocks)


def block_key_of(tokens: list[int], blocks: int, digest: str | None = None) -> bytes:
    key = root_key(digest, "")
    for index in range(blocks):
        key = block_key(key, tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS])
    return key


def test_what_preempted_sequences_had_computed_is_found_again(llama_dir: Path, llama: BaseModel) -> None:
    prompts = toys.prompts(6, seed=2)
    rows, tokens = {}, {}
    for prefix_cache in (True, False):
        harness = Harness(
            llama_dir, llama, kv_memory_bytes=kv_bytes(llama, 12), prefix_cache=prefix_cache, max_step_tokens=64
        )
        for number, prompt in enumerate(prompts):
            harness.add(number, prompt, max_tokens=40)
        harness.run()
        rows[prefix_cache], tokens[prefix_cache] = sum(harness.rows.values()), harness.tokens
        assert_nothing_is_in_use(harness.engine.blocks)
    least = sum(len(prompt) + 39 for prompt in prompts)
    assert least <= rows[True] < rows[False]
    assert tokens[True] == tokens[False]
    reference = Reference(llama_dir, {})
    for number, prompt in enumerate(prompts):
        expected = reference.logits(prompt + tokens[True][number], None)[len(prompt) - 1 : -1]
        assert tokens[True][number] == expected.argmax(-1).tolist()


def test_keys_say_everything_that_the_values_depend_on() -> None:
    tokens = list(range(BLOCK_TOKENS))
    roots = [("a", "bc"), ("ab", "c"), (None, ""), ("base", ""), ("", ""), ("", "base"), (None, "a"), ("a", "")]
    keys = {root_key(digest, salt) for digest, salt in roots}
    assert len(keys) == len(roots)
    keys |= {block_key(root, tokens) for root in list(keys)} | {block_key(root_key("a", ""), tokens[::-1])}
    assert len(keys) == 2 * len(roots) + 1
    assert block_key_of(tokens * 2, 2) != block_key_of(tokens * 2, 1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_blocks_are_counted_right_whatever_happens(data: st.DataObject) -> None:
    """Sequences of two different tokens share, grow, are kept, forgotten and released, in a pool of seven blocks."""
    pool = BlockPool(7)
    tables: list[tuple[list[int], list[int]]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["begin", "grow", "forget", "release"]))
        if action == "begin":
            content = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=5))
            table: list[int] = []
            keys = [block_key_of([n for n in content for _ in range(16)], i + 1) for i in range(len(content))]
            pool.share(table, keys[:-1])
            if not pool.extend(table, 16 * len(content)):
                pool.release(table)
                continue
            for block, key in zip(table, keys, strict=True):
                pool.cache(block, key)
            tables.append((table, content))
        elif tables:
            index = data.draw(st.integers(0, len(tables) - 1))
            table, content = tables[index]
            if action == "grow":
                before = list(table)
                if not pool.extend(table, 16 * len(table) + 1):
                    assert table == before
                    assert pool.free_blocks == 0
            elif action == "forget":
                alone = pool.forget(table)
                assert all(sum(block in other for other, _ in tables) == 1 for block in alone)
            else:
                pool.release(table)
                del tables[index]
        users = Counter(block for table, _ in tables for block in table)
        assert pool._users == [users[block] for block in range(7)]
        assert len(users) + len(pool._free) + len(pool._idle) == 7
        assert len(set(pool._free) | set(pool._idle) | set(users)) == 7
        assert {key: block for block, key in pool._key_of.items()} == pool._block_of
    for table, _ in tables:
        pool.release(table)
    assert_nothing_is_in_use(pool)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(3, 4), min_size=1, max_size=4),
            st.integers(1, 15),
            st.sampled_from(["", "s"]),
            st.integers(-1, 1),
            st.integers(1, 30),
        ),
        min_size=1,
        max_size=12,
    ),
    cancels=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 11)), max_size=4),
    step_tokens=st.sampled_from([16, 40, 1024]),
    cache_blocks=st.integers(6, 16),
)
def test_any_course_of_requests_gives_the_same_tokens_and_leaves_nothing(
    llama_dir: Path, llama: BaseModel, requests: Any, cancels: Any, step_tokens: int, cache_blocks: int
) -> None:
    """Prompts made of runs of two tokens, so that they share beginnings; some are cancelled on the way."""
    limits: dict[str, Any] = {"kv_memory_bytes": kv_bytes(llama, cache_blocks), "max_step_tokens": step_tokens}
    small = Harness(llama_dir, llama, **limits, max_sequences=5)
    plain = Harness(llama_dir, llama, prefix_cache=False)
    for number, (content, last, salt, priority, length) in enumerate(requests):
        prompt = [token for token in content for _ in range(16)][: 16 * (len(content) - 1) + last]
        for harness in (small, plain):
            harness.add(number, prompt, max_tokens=length, cache_salt=salt, priority=priority)
    while small.engine.active:
        for _, number in (cancel for cancel in cancels if cancel[0] == small.steps):
            small.engine.cancel(number)
        small.step()
        assert small.steps < 2000
    plain.run()
    for number in small.finished:
        assert small.tokens[number] == plain.tokens[number]
    assert set(plain.finished) - set(small.finished) <= {number for _, number in cancels}
    assert_nothing_is_in_use(small.engine.blocks)
