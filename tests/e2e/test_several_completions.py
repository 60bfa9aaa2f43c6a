"""Several completions of one prompt, and what is said of the prompt, over gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.e2e.reference import PROMPT, TOLERANCE
from tests.e2e.serving import Server

from graftwork import Client, TokenLogprob

# ------------------------------------------------------------------------------------------- several completions


def mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def test_of_n_completions_each_is_whole(client: Client, tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 11, "ignore_eos": True, "logprobs": 2}
    single = client.generate("base", PROMPT, **options)
    with client.generate("base", PROMPT, n=4, stream=True, **options) as stream:
        chunks = list(stream)
    several = stream.result()
    assert [completion.index for completion in several.completions] == [0, 1, 2, 3]
    assert several.completions[0].token_ids == single.token_ids
    assert len({completion.token_ids for completion in several.completions}) == 4
    for completion in several.completions:
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert [entry.token_id for entry in completion.logprobs or ()] == list(completion.token_ids)
        assert (completion.finish_reason, completion.score) == ("length", None)
    assert {chunk.index for chunk in chunks} == {0, 1, 2, 3}
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert several.usage.prompt_tokens == len(PROMPT)
    assert several.usage.completion_tokens == 48
    again = client.generate("base", PROMPT, n=4, **options)
    assert [one.token_ids for one in again.completions] == [one.token_ids for one in several.completions]


def test_a_stop_text_ends_one_completion_and_not_its_neighbours(client: Client) -> None:
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0, "seed": 3, "ignore_eos": True, "n": 5}
    free = client.generate("base", PROMPT, **options)
    stop = free.completions[2].text[4:6]
    stopped = client.generate("base", PROMPT, stop=[stop], **options)
    for before, after in zip(free.completions, stopped.completions, strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert after.finish_reason == ("stop" if stop in before.text else "length")
    assert stopped.completions[2].finish_reason == "stop"
    assert {completion.finish_reason for completion in stopped.completions} == {"stop", "length"}


def test_best_of_returns_the_most_likely_ones(client: Client) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 1.3, "seed": 21, "ignore_eos": True}
    sampled = client.generate("base", PROMPT, n=6, logprobs=0, **options).completions
    scores = {one.token_ids: mean(entry.logprob for entry in one.logprobs or ()) for one in sampled}
    expected = sorted(scores, key=lambda ids: -scores[ids])
    best = client.generate("base", PROMPT, n=3, best_of=6, **options)
    assert [completion.token_ids for completion in best.completions] == expected[:3]
    assert [completion.index for completion in best.completions] == [0, 1, 2]
    for completion in best.completions:
        assert completion.score == pytest.approx(scores[completion.token_ids], abs=TOLERANCE)
        assert completion.logprobs is None
    assert best.usage.completion_tokens == 60, "what was sampled and thrown away was computed all the same"
    with client.generate("base", PROMPT, best_of=4, prompt_logprobs=0, stream=True, **options) as stream:
        chunks = list(stream)
    assert {chunk.index for chunk in chunks} == {0}
    assert [entry.token_id for entry in chunks[0].prompt_logprobs] == PROMPT


def test_leaving_several_completions_ends_them_all(client: Client, server: Server) -> None:
    with client.generate("base", PROMPT, max_tokens=100_000, ignore_eos=True, n=8, stream=True) as stream:
        next(stream)
    # Their blocks are free again: a prompt that needs nearly the whole cache still runs.
    assert client.generate("base", PROMPT, max_tokens=2).token_ids


# ------------------------------------------------------------------------------------------- the prompt


def assert_same_scores(actual: Sequence[TokenLogprob] | None, expected: Sequence[TokenLogprob]) -> None:
    """Token by token. They come from batches of other shapes, so log probabilities differ by rounding."""
    assert actual is not None
    for here, there in zip(actual, expected, strict=True):
        assert (here.token_id, here.text) == (there.token_id, there.text)
        assert here.logprob == pytest.approx(there.logprob, abs=TOLERANCE)
        assert [one.token_id for one in here.top] == [one.token_id for one in there.top]
        assert [one.logprob for one in here.top] == pytest.approx([one.logprob for one in there.top], abs=TOLERANCE)


@pytest.mark.parametrize("extra", [{}, {"n": 3, "temperature": 1.0, "seed": 1}, {"best_of": 2}], ids=str)
def test_prompt_logprobs_are_those_of_score(client: Client, extra: dict[str, Any]) -> None:
    scored = client.score("base", PROMPT, top_logprobs=3)
    answer = client.generate("base", PROMPT, max_tokens=4, prompt_logprobs=3, **extra)
    assert_same_scores(answer.prompt_logprobs, scored.tokens)
    assert client.generate("base", PROMPT, max_tokens=4).prompt_logprobs is None
    messages = [{"role": "user", "content": "the quick fox"}]
    chat = client.chat("base", messages, max_tokens=4, prompt_logprobs=0, **extra)
    assert_same_scores(chat.prompt_logprobs, client.score("base", client.tokenize(messages).token_ids).tokens)


def test_echo_begins_with_the_prompt(client: Client, tokenizer: Any) -> None:
    text = "the quick fox"
    plain = client.generate("base", text, max_tokens=5, n=2)
    for stop in ([], ["quick"]):  # a stop text is looked for in the completion only
        echoed = client.generate("base", text, max_tokens=5, n=2, echo=True, stop=stop)
        assert [one.text for one in echoed.completions] == [text + one.text for one in plain.completions]
        assert echoed.token_ids == plain.token_ids
    ids = client.tokenize(text).token_ids
    assert client.generate("base", ids, max_tokens=5, echo=True).text == text + plain.text
