"""Bias, penalties, forbidden tokens and tail cuts: what transformers' processors say, whatever else is in the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.bounds import assert_near
from tests.server.engine.sampling.sampling_harness import sample
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from graftwork_server.engine.sampling.logits_processing import TokenCounts, process_logits
from graftwork_server.engine.scheduling.sequence import Sequence
from graftwork_server.wire.engine import Generate, Sampling

VOCAB = 40
EOS = frozenset({2, 3})
PROMPT = [5, 6, 7, 5, 9]


def sequence(generated: list[int], prompt: list[int] = PROMPT, **sampling: Any) -> Sequence:
    made = Sequence.of(Generate(id=1, prompt_ids=prompt, sampling=Sampling(max_tokens=99, **sampling)), EOS)
    made.tokens += generated
    return made


def process(logits: torch.Tensor, batch: list[Sequence]) -> bool:
    """process_logits for a batch; whether any of it asks for something."""
    asking = [row for index, member in enumerate(batch) if (row := member.processed_row(index)) is not None]
    process_logits(logits, asking)
    return bool(asking)


def some_logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def additive(presence: float, frequency: float, generated: list[int]) -> Any:
    """OpenAI's definition, token by token; transformers has no such processor."""

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token in range(VOCAB):
            count = generated.count(token)
            scores[0, token] -= count * frequency + (count > 0) * presence
        return scores

    return process


CASES: list[tuple[dict[str, Any], list[int], Any]] = [
    ({"repetition_penalty": 1.7}, [11, 12, 11], lambda g: [RepetitionPenaltyLogitsProcessor(1.7)]),
    ({"repetition_penalty": 0.6}, [], lambda g: [RepetitionPenaltyLogitsProcessor(0.6)]),
    ({"presence_penalty": 1.5}, [11, 12, 11], lambda g: [additive(1.5, 0, g)]),
    ({"frequency_penalty": -0.5}, [11, 12, 11], lambda g: [additive(0, -0.5, g)]),
    (
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4},
        [11, 12, 11, 5],
        lambda g: [RepetitionPenaltyLogitsProcessor(1.2), additive(0.3, 0.4, g)],
    ),
    (
        {"logit_bias": {4: 12.5, 39: -100.0}, "repetition_penalty": 1.3},
        [4],
        lambda g: [SequenceBiasLogitsProcessor([[[4], 12.5], [[39], -100.0]]), RepetitionPenaltyLogitsProcessor(1.3)],
    ),
    (
        {"bad_words": [[8], [11, 12, 13], [12, 14], [9, 9, 10]]},
        [9, 11, 12],
        lambda g: [NoBadWordsLogitsProcessor([[8], [11, 12, 13], [12, 14], [9, 9, 10]])],
    ),
    # A bad word may begin in the prompt and be as long as all there is.
    ({"bad_words": [[5, 9, 20], [9, 21]]}, [], lambda g: [NoBadWordsLogitsProcessor([[5, 9, 20], [9, 21]])]),
    ({"bad_words": [[1] * 30]}, [], lambda g: [NoBadWordsLogitsProcessor([[1] * 30])]),
    ({"min_tokens": 3}, [11, 12], lambda g: [MinNewTokensLengthLogitsProcessor(5, 3, sorted(EOS))]),
    ({"min_tokens": 2}, [11, 12], lambda g: [MinNewTokensLengthLogitsProcessor(5, 2, sorted(EOS))]),
]


@pytest.mark.parametrize(("sampling", "generated", "processors"), CASES)
def test_it_is_what_transformers_does(sampling: dict[str, Any], generated: list[int], processors: Any) -> None:
    logits = some_logits(1)
    ids = torch.tensor([PROMPT + generated])
    expected = LogitsProcessorList(processors(generated))(ids, logits[None].clone())[0]
    assert not torch.equal(expected, logits) or sampling == {"min_tokens": 2} or sampling == {"bad_words": [[1] * 30]}
    mine = logits[None].clone()
    assert process(mine, [sequence(generated, **sampling)])
    assert_near(mine[0], expected, terms=4)  # a logit is changed a few times


def test_a_whole_batch_at_once_is_each_by_itself() -> None:
    batch = [sequence(generated, **sampling) for sampling, generated, _ in CASES]
    batch.insert(3, sequence([11]))
    logits = torch.stack([some_logits(row) for row in range(len(batch))])
    together = logits.clone()
    assert process(together, batch)
    for row, member in enumerate(batch):
        alone = logits[row : row + 1].clone()
        process(alone, [member])
        assert torch.equal(together[row], alone[0])
    assert torch.equal(together[3], logits[3])


def test_counts_follow_the_sequence_as_it_grows() -> None:
    growing = sequence([], presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5)
    for token in (11, 5, 11):
        fresh = sequence(growing.tokens[len(PROMPT) :], **_penalties(growing))
        grown, anew = some_logits(2)[None].clone(), some_logits(2)[None].clone()
        process(grown, [growing])
        process(anew, [fresh])
        assert torch.equal(grown, anew)
        growing.tokens.append(token)


def _penalties(member: Sequence) -> dict[str, float]:
    sampling = member.request.sampling
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty")
    return {name: getattr(sampling, name) for name in names}


def test_nothing_asked_for_is_nothing_done() -> None:
    logits = some_logits(3)[None]
    before = logits.clone()
    assert sequence([1]).processing is None
    assert not process(logits, [sequence([1]), sequence([], temperature=0.5, top_k=3)][:1])
    assert torch.equal(logits, before)


def test_where_nothing_is_allowed_there_is_no_token() -> None:
    everything = [[token] for token in range(VOCAB)]
    for temperature in (0.0, 1.0):
        stuck, free = sequence([], bad_words=everything, temperature=temperature), sequence([])
        logits = torch.stack([some_logits(4), some_logits(4)])
        assert sample(logits, [stuck, free]) == [None, int(some_logits(4).argmax())]


def test_tokens_that_the_model_has_no_logit_for_are_passed_over() -> None:
    """A tokenizer may have more tokens than the embedding has rows."""
    logits = some_logits(5)[None]
    for beyond, within in (([[VOCAB], [8, VOCAB + 1]], [[7]]), ([[PROMPT[-1], VOCAB]], [])):
        mine, expected = logits.clone(), logits.clone()
        assert process(mine, [sequence([], bad_words=beyond + within)])
        for (token,) in within:
            expected[0, token] = float("-inf")
        assert torch.equal(mine, expected)
    ending = sequence([], min_tokens=2, stop_token_ids=[3, VOCAB + 7])
    assert process(logits, [ending])
    assert logits[0, 3] == float("-inf")


CUTS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    ({"min_p": 0.02, "top_k": 7}, [TopKLogitsWarper(7), MinPLogitsWarper(0.02)]),
    ({"min_p": 0.05, "top_p": 0.8}, [TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)]),
    ({"typical_p": 0.3}, [TypicalLogitsWarper(0.3)]),
    ({"typical_p": 0.95}, [TypicalLogitsWarper(0.95)]),
    (
        {"typical_p": 0.5, "top_k": 12, "top_p": 0.9},
        [TopKLogitsWarper(12), TopPLogitsWarper(0.9), TypicalLogitsWarper(0.5)],
    ),
    (
        {"typical_p": 0.7, "min_p": 0.02, "top_p": 0.97},
        [TopPLogitsWarper(0.97), MinPLogitsWarper(0.02), TypicalLogitsWarper(0.7)],
    ),
]


@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize(("cuts", "warpers"), CUTS)
def test_cuts_leave_transformers_distribution(cuts: dict[str, Any], warpers: list[Any], temperature: float) -> None:
    """An even grid of draws must meet each token as often as its probability says, to one draw in thousands."""
    logits, count = some_logits(5), 4000
    ids = torch.tensor([PROMPT])
    warped = LogitsProcessorList([TemperatureLogitsWarper(temperature), *warpers])(ids, logits[None].clone())[0]
    expected = warped.softmax(-1)
    source = sequence([], temperature=temperature, **cuts)
    grid = iter([(index + 0.5) / count for index in range(count)])
    source.random = SimpleNamespace(random=lambda: next(grid))  # type: ignore[assignment]
    drawn = torch.zeros(VOCAB)
    for _ in range(count):
        (token,) = sample(logits[None].clone(), [source])
        assert token is not None
        drawn[token] += 1
    assert ((drawn > 0) == (expected > 0.5 / count)).all()
    torch.testing.assert_close(drawn / count, expected, atol=1.5 / count, rtol=0)


def test_min_p_looks_beyond_the_first_candidates() -> None:
    flat = torch.zeros(5000)
    source = sequence([], temperature=1.0, min_p=0.5, seed=1)
    drawn = {sample(flat[None].clone(), [source])[0] for _ in range(400)}
    assert max(token for token in drawn if token is not None) > 1024


def test_virtual_tokens_are_not_counted_as_words() -> None:
    counts = TokenCounts()
    counts.update([0, 0, 5, 6], 3, virtual_tokens=2)
    counts.update([0, 0, 5, 6, 6], 3, virtual_tokens=2)
    assert (list(counts.ids), list(counts.completion)) == ([5, 6], [0.0, 2.0])
