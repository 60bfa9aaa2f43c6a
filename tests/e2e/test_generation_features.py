"""How tokens are chosen and when a generation ends, over gRPC, against transformers' own generate."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.reference import PROMPT
from tests.e2e.serving import START_SECONDS, Server
from transformers import (
    AutoModelForCausalLM,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from graftwork import AsyncClient, Client

COUNT = 24


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    """transformers' own model."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def greedy(model: Any, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    """What transformers generates, without the prompt."""
    settings = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)
    return ids[0, len(prompt) :].tolist()


# ------------------------------------------------------------------------------------------- which token


def test_processors_are_transformers(client: Client, model: Any) -> None:
    plain = greedy(model)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
        ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
        ({"logit_bias": {50: 6.0, plain[0]: -100.0}}, {"sequence_bias": [[[50], 6.0], [[plain[0]], -100.0]]}),
        (
            {"logit_bias": {50: 6.0}, "repetition_penalty": 1.6},
            {"sequence_bias": [[[50], 6.0]], "repetition_penalty": 1.6},
        ),
    ]
    for ours, theirs in cases:
        expected = greedy(model, **theirs)
        assert expected != plain, "the case changes nothing, so it shows nothing"
        answer = client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True, **ours)
        assert list(answer.token_ids) == expected, ours


def test_presence_and_frequency_penalties_are_openais(client: Client, model: Any) -> None:
    def expected(presence: float, frequency: float) -> list[int]:
        generated: list[int] = []
        for _ in range(COUNT):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([PROMPT + generated])).logits[0, -1]
            for token in set(generated):
                logits[token] -= presence + frequency * generated.count(token)
            generated.append(int(logits.argmax()))
        return generated

    plain = expected(0, 0)
    for presence, frequency in ((4.0, 0.0), (0.0, 2.5), (1.0, 1.5), (-3.0, 0.0)):
        answer = client.generate(
            "base",
            PROMPT,
            max_tokens=COUNT,
            ignore_eos=True,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        assert list(answer.token_ids) == expected(presence, frequency)
        assert list(answer.token_ids) != plain or presence < 0


def test_bad_words_do_not_come(client: Client, model: Any, tokenizer: Any) -> None:
    plain = greedy(model)
    # One word of one token, and one that takes several: found as the model likes to write them.
    texts = [tokenizer.decode(plain[at : at + 2]) for at in range(COUNT - 1)]
    words = [text for text in texts if text and "\ufffd" not in text and text.strip()][:6]
    assert words
    forms = [tokenizer.encode(form, add_special_tokens=False) for word in words for form in (word, " " + word.lstrip())]
    answer = client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True, bad_words=words)
    assert list(answer.token_ids) == greedy(model, bad_words_ids=forms)
    assert list(answer.token_ids) != plain


def test_cuts_of_the_tail_leave_the_most_likely_token(client: Client, model: Any) -> None:
    plain = greedy(model)
    for cut in ({"min_p": 1.0}, {"top_k": 1}, {"top_p": 1e-6}):
        answer = client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True, temperature=1.5, seed=1, **cut)
        assert list(answer.token_ids) == plain
    free = client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True, temperature=1.5, seed=1)
    typical = client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True, temperature=1.5, seed=1, typical_p=0.2)
    assert len({tuple(plain), free.token_ids, typical.token_ids}) == 3


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.2, "seed": 5, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.8, "seed": 6, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 7, "typical_p": 0.8, "presence_penalty": 0.5},
    {"temperature": 1.0, "seed": 8, "frequency_penalty": 0.5, "logit_bias": {7: 3.0}, "bad_words": ["the"]},
    {"temperature": 0.0, "min_tokens": 9, "logprobs": 3},
]


async def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(server: Server, client: Client) -> None:
    alone = [client.generate("base", PROMPT, max_tokens=COUNT, **options).token_ids for options in OPTIONS]
    assert len(set(alone)) == len(OPTIONS)
    async with AsyncClient(address=server.address, timeout=START_SECONDS) as connected:
        mixed = await asyncio.gather(
            *(
                connected.generate("base", PROMPT[: 3 + index] if index else PROMPT, max_tokens=COUNT, **options)
                for index in (0, 1, 2, 0)
                for options in OPTIONS
            )
        )
    assert [answer.token_ids for answer in mixed[: len(OPTIONS)]] == alone
    assert [answer.token_ids for answer in mixed[-len(OPTIONS) :]] == alone


WARPERS: dict[str, tuple[dict[str, Any], Any]] = {
    "cold": ({"temperature": 0.4}, TemperatureLogitsWarper(0.4)),
    "hot": ({"temperature": 3.0}, TemperatureLogitsWarper(3.0)),
    "top_k": ({"temperature": 1.0, "top_k": 2}, TopKLogitsWarper(2)),
    "top_p": ({"temperature": 1.0, "top_p": 0.6}, TopPLogitsWarper(0.6)),
    "min_p": ({"temperature": 1.0, "min_p": 0.3}, MinPLogitsWarper(0.3)),
    "typical_p": ({"temperature": 1.0, "typical_p": 0.5}, TypicalLogitsWarper(0.5)),
}


@pytest.mark.parametrize("case", WARPERS)
def test_tokens_are_drawn_as_often_as_transformers_would(client: Client, model: Any, case: str) -> None:
    """512 draws of eight tokens, which biases make likely by known amounts."""
    options, warper = WARPERS[case]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    wanted = torch.tensor([20.0, 19.3, 18.6, 18.0, 17.5, 17.0, 16.5, 16.0])
    tokens = list(range(50, 58))
    bias = {token: float(goal - logits[token]) for token, goal in zip(tokens, wanted, strict=True)}
    drawn: list[int] = []
    for seed in range(16):
        answer = client.generate("base", PROMPT, max_tokens=1, n=32, seed=seed, logit_bias=bias, **options)
        drawn += [one.token_ids[0] for one in answer.completions]
    found = torch.tensor([drawn.count(token) / len(drawn) for token in tokens])
    expected = warper(torch.tensor([PROMPT]), wanted[None]).softmax(-1)[0]
    assert (found - expected).abs().sum() / 2 < 0.1
    assert (found > 0).tolist() == (expected > 1e-3).tolist()
    assert (found - wanted.softmax(-1)).abs().sum() / 2 > 0.12, "the case changes nothing, so it shows nothing"


def test_the_most_likely_alternatives_are_the_models(client: Client, model: Any) -> None:
    answer = client.generate("base", PROMPT, max_tokens=6, ignore_eos=True, logprobs=4, prompt_logprobs=4)
    ids = [*PROMPT, *answer.token_ids]
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    entries = [*(answer.prompt_logprobs or ())[1:], *(answer.logprobs or ())]
    assert len(entries) == len(ids) - 1
    for entry, token, row in zip(entries, ids[1:], table, strict=False):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, best = row.topk(4)
        assert [top.token_id for top in entry.top] == best.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


# ------------------------------------------------------------------------------------------- when it ends


def test_the_end_of_sequence_token_ends_it_unless_it_is_ignored(client: Client) -> None:
    for ignore, reason, count in ((False, "stop", 1), (True, "length", 5)):
        answer = client.generate("base", PROMPT, max_tokens=5, logit_bias={2: 100.0}, ignore_eos=ignore)
        assert (answer.finish_reason, answer.usage.completion_tokens) == (reason, count)


def test_a_stop_token_ends_it_and_is_no_text(client: Client, model: Any, tokenizer: Any) -> None:
    plain = greedy(model)
    at = next(index for index in range(3, COUNT) if plain[index] not in plain[:index])
    for ignore_eos in (True, False):
        answer = client.generate(
            "base", PROMPT, max_tokens=COUNT, ignore_eos=ignore_eos, stop_token_ids=[plain[at], 300]
        )
        assert list(answer.token_ids) == plain[: at + 1]
        assert answer.finish_reason == "stop"
        assert answer.usage.completion_tokens == at + 1
        assert answer.text == tokenizer.decode(plain[:at], skip_special_tokens=True)


def test_nothing_ends_it_before_min_tokens(client: Client, model: Any) -> None:
    plain = greedy(model)
    stop = plain[2]
    answer = client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True, stop_token_ids=[stop], min_tokens=8)
    assert stop not in answer.token_ids[:8]
    eos = greedy(model, min_new_tokens=8, eos_token_id=[2, plain[2]])
    answer = client.generate("base", PROMPT, max_tokens=COUNT, stop_token_ids=[stop], min_tokens=8)
    assert list(answer.token_ids) == eos


def test_stop_texts_count_after_min_tokens_and_never_leak(client: Client, tokenizer: Any) -> None:
    free = client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True)
    text, ids = free.text, list(free.token_ids)
    # A text across the border of two tokens, and in none of them.
    said = [tokenizer.decode(ids[:count]) for count in range(COUNT)]
    borders = [len(start) for start in said if start and text.startswith(start)]
    pieces = [tokenizer.decode([id]) for id in ids]
    stop = next(
        pair for at in borders if len(pair := text[at - 1 : at + 1]) == 2 and not any(pair in piece for piece in pieces)
    )
    first = text.index(stop)
    with client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True, stop=[stop], stream=True) as stream:
        pieces = [chunk.text for chunk in stream]
    assert "".join(pieces) == text[:first]
    answer = client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True, stop=[stop], min_tokens=1)
    assert answer.text == text[:first]
    answer = client.generate("base", PROMPT, max_tokens=COUNT, ignore_eos=True, stop=[stop], min_tokens=COUNT)
    assert answer.text == text
    assert answer.finish_reason == "length"
