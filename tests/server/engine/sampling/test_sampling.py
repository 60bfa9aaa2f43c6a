"""Sampling: the right distribution, seeded by request, independent of the batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bounds import rounding
from tests.server.engine.harness import Harness
from tests.server.engine.sampling.sampling_harness import sample, token_logprobs

from graftwork_server.engine.scheduling.sequence import Sequence
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.wire.engine import Generate, Sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, float("-inf")])


def sequence(**sampling: object) -> Sequence:
    return Sequence.of(Generate(id=1, prompt_ids=[1], sampling=Sampling(max_tokens=1, **sampling)))  # type: ignore[arg-type]


def draw(count: int, **sampling: object) -> Counter[int]:
    source = sequence(**sampling)
    return Counter(sample(LOGITS[None], [source])[0] for _ in range(count))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    count = 4000
    drawn = draw(count, temperature=temperature, seed=3)
    expected = (LOGITS / temperature).softmax(-1)
    for token, probability in enumerate(expected.tolist()):
        # five standard deviations of a binomial: the seed is fixed, so this cannot be flaky
        assert abs(drawn[token] - count * probability) <= 5 * (count * probability * (1 - probability)) ** 0.5 + 1e-9


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert set(draw(500, temperature=1.0, top_k=2)) == {1, 4}
    assert set(draw(50, temperature=5.0, top_k=1)) == {1}
    probabilities = LOGITS.softmax(-1)
    two_best = (probabilities[1] + probabilities[4]).item()
    assert set(draw(500, temperature=1.0, top_p=two_best - 0.01)) == {1, 4}
    assert set(draw(500, temperature=1.0, top_p=two_best + 0.01)) == {1, 4, 2}
    assert set(draw(200, temperature=1.0, top_p=1e-6)) == {1}


def test_top_p_searches_beyond_the_first_candidates() -> None:
    flat = torch.zeros(5000)
    source = sequence(temperature=1.0, top_p=0.9, seed=1)
    drawn = {sample(flat[None], [source])[0] for _ in range(400)}
    assert len(drawn) > 300
    assert max(drawn) > 1024


def test_temperature_zero_is_greedy_and_tiny_ones_do_not_overflow() -> None:
    assert set(draw(5)) == {1}
    assert set(draw(20, temperature=1e-30)) == {1}


@given(st.integers(0, 2**63 - 1), st.floats(0.1, 3), st.floats(0.05, 1), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_what_else_is_in_the_batch_changes_nothing(seed: int, temperature: float, top_p: float, top_k: int) -> None:
    chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    alone = [sample(LOGITS[None], [source])[0] for source in [sequence(**chosen)] for _ in range(5)]
    mixed_source, other = sequence(**chosen), sequence(temperature=1.0, seed=5)
    mixed = [sample(torch.stack([LOGITS * 2, LOGITS]), [other, mixed_source])[1] for _ in range(5)]
    assert alone == mixed


def test_seeded_generation_repeats_and_differs_by_seed(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama)
    for request, seed in enumerate((7, 7, 8)):
        harness.add(request, [5, 6, 7], temperature=1.5, seed=seed, max_tokens=20)
    harness.run()
    assert harness.tokens[0] == harness.tokens[1]
    assert harness.tokens[0] != harness.tokens[2]


def test_logprobs_are_those_of_the_model_at_temperature_one() -> None:
    entry = token_logprobs(LOGITS[None], [2], 3)[0]
    expected = LOGITS.log_softmax(-1)
    bound = rounding(LOGITS, len(LOGITS))
    assert entry.logprob == pytest.approx(expected[2].item(), abs=bound)
    assert [token for token, _ in entry.top] == [1, 4, 2]
    assert [value for _, value in entry.top] == pytest.approx([expected[i].item() for i in (1, 4, 2)], abs=bound)
    assert token_logprobs(LOGITS[None], [2], 0)[0].top == []


def test_eos_ends_unless_ignored(llama_dir: Path, llama: BaseModel) -> None:
    harness = Harness(llama_dir, llama)
    harness.engine._scheduler.eos_token_ids = frozenset(range(3, 160))
    harness.add(1, [5, 6, 7], ignore_eos=False)
    harness.add(2, [5, 6, 7], ignore_eos=True)
    harness.run()
    assert harness.finished[1].finish == "stop"
    assert len(harness.tokens[1]) == 1
    assert harness.finished[2].finish == "length"


def test_logits_that_are_not_finite_fail_that_sequence_alone(llama_dir: Path, llama: BaseModel) -> None:
    from graftwork_plugins import LowRank

    harness = Harness(llama_dir, llama)
    # Finite weights whose product overflows float32 in the first layer.
    module = "model.layers.0.self_attn.v_proj"
    huge = LowRank(module=module, a=torch.full((1, 48), 1e30), b=torch.full((16, 1), 1e30), scaling=1.0)
    ref = harness.place("huge", [huge])
    for request in (1, 3):
        harness.add(request, [5, 6, 7], ref)
        harness.add(request + 1, [5, 6, 7])
        harness.run()
    error = harness.finished[1].error
    assert error is not None
    assert error.reason == "LOGITS_NOT_FINITE"
    assert harness.tokens[2] == harness.tokens[4]
    assert len(harness.tokens[2]) == 12
