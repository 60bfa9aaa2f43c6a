"""What no generation takes: each refusal names its field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.e2e.reference import PROMPT

from graftwork import Client, InvalidArgumentError

# ------------------------------------------------------------------------------------------- refusals


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"min_p": 1.5}, "sampling.min_p"),
    ({"min_p": math.nan}, "sampling.min_p"),
    ({"typical_p": 0.0}, "sampling.typical_p"),
    ({"typical_p": math.inf}, "sampling.typical_p"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
    ({"repetition_penalty": math.nan}, "sampling.repetition_penalty"),
    ({"repetition_penalty": 1e30}, "sampling.repetition_penalty"),
    ({"presence_penalty": 101.0}, "sampling.presence_penalty"),
    ({"presence_penalty": math.nan}, "sampling.presence_penalty"),
    ({"frequency_penalty": -math.inf}, "sampling.frequency_penalty"),
    ({"logit_bias": {5: math.nan}}, "sampling.logit_bias[5]"),
    ({"logit_bias": {5: 100.5}}, "sampling.logit_bias[5]"),
    ({"logit_bias": {4_000_000_000: 1.0}}, "sampling.logit_bias[4000000000]"),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "sampling.logit_bias"),
    ({"bad_words": ["x"] * 129}, "sampling.bad_words"),
    ({"bad_words": ["fine", ""]}, "sampling.bad_words[1]"),
    ({"bad_words": ["x" * 257]}, "sampling.bad_words[0]"),
    ({"stop_token_ids": [1, 320]}, "sampling.stop_token_ids[1]"),
    ({"stop_token_ids": [1] * 129}, "sampling.stop_token_ids"),
    ({"min_tokens": -1}, "sampling.min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "sampling.min_tokens"),
]


@pytest.mark.parametrize(("options", "field"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_out_of_range_is_named(client: Client, options: dict[str, Any], field: str) -> None:
    for call in (client.generate, client.chat):
        prompt: Any = PROMPT if call == client.generate else [{"role": "user", "content": "fox"}]
        with pytest.raises(InvalidArgumentError) as caught:
            call("base", prompt, **options)  # type: ignore[operator]
        assert [violation.field for violation in caught.value.field_violations] == [field]
        assert "accepted" in caught.value.field_violations[0].description
    assert client.generate("base", PROMPT, max_tokens=1).token_ids


# ------------------------------------------------------------------------------------------- the prompt


WRONG_COUNTS: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "sampling.n"),
    ({"n": -1}, "sampling.n"),
    ({"n": 33}, "sampling.n"),
    ({"n": 2**31 - 1}, "sampling.n"),
    ({"n": 2, "best_of": 1}, "sampling.best_of"),
    ({"best_of": 33}, "sampling.best_of"),
    ({"best_of": 0}, "sampling.best_of"),
    ({"prompt_logprobs": 21}, "sampling.prompt_logprobs"),
    ({"prompt_logprobs": -1}, "sampling.prompt_logprobs"),
]


@pytest.mark.parametrize(("options", "field"), WRONG_COUNTS, ids=str)
def test_counts_out_of_range_are_named(client: Client, options: dict[str, Any], field: str) -> None:
    test_what_is_out_of_range_is_named(client, options, field)


def test_more_prompt_logprobs_than_a_message_holds_are_refused(client: Client) -> None:
    prompt = [5] * 60_000
    for call in (
        lambda: client.generate("base", prompt, max_tokens=1, prompt_logprobs=20),
        lambda: client.score("base", prompt, top_logprobs=20),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            call()
        assert "at most 16 is accepted" in caught.value.field_violations[0].description
