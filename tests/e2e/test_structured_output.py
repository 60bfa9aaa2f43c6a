"""Structured output over gRPC: every form is kept to, ends by itself, and mixes with whatever else runs."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from tests.e2e.reference import PROMPT
from tests.e2e.serving import START_SECONDS, Server

from graftwork import AsyncClient, Client, FailedPreconditionError, InvalidArgumentError
from graftwork.v1 import generation_pb2 as pb
from graftwork.v1.generation_pb2_grpc import GenerationServiceStub

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["fox", "dog"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
LARK = 'start: "<" pair (";" pair)? ">"\npair: KEY "=" KEY\nKEY: /[a-c]{2,4}/\n'
LARK_TEXT = r"<[a-c]{2,4}=[a-c]{2,4}(;[a-c]{2,4}=[a-c]{2,4})?>"
CHOICES = ["quick brown", "lazy", 'a "quoted" \\ word', "über\n"]
FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "json_schema": ({"json_schema": SCHEMA}, lambda text: json.loads(text)["name"] in ("fox", "dog")),
    "regex": ({"regex": r"[0-9]{4}-(0[1-9]|1[0-2])"}, re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])").fullmatch),
    "choice": ({"choice": CHOICES}, CHOICES.__contains__),
    "lark": ({"lark": LARK}, re.compile(LARK_TEXT).fullmatch),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_every_form_is_kept_to_and_ends(client: Client, form: str, ignore_eos: bool) -> None:
    options, accepts = FORMS[form]
    for sampling in ({}, {"temperature": 1.5, "seed": 1}, {"temperature": 3.0, "seed": 2, "top_k": 5}):
        answer = client.generate("base", PROMPT, max_tokens=120, ignore_eos=ignore_eos, **sampling, **options)
        assert accepts(answer.text), answer.text
        assert answer.finish_reason == "stop"
    chat = client.chat("base", [{"role": "user", "content": "x"}], max_tokens=120, **options)
    assert accepts(chat.text)


def test_the_most_likely_allowed_token_is_taken(client: Client) -> None:
    """Against the model's own logits: of the digits, which are single tokens here, the likeliest."""
    digits = {client.tokenize(str(digit)).token_ids[0]: str(digit) for digit in range(10)}
    prompt, expected = list(PROMPT), ""
    for _ in range(3):
        first = client.generate("base", prompt, max_tokens=1, logit_bias=dict.fromkeys(digits, 100.0))
        expected += digits[first.token_ids[0]]
        prompt.append(first.token_ids[0])
    answer = client.generate("base", PROMPT, regex="[0-9]{3}", max_tokens=9, logprobs=2)
    assert answer.text == expected
    assert answer.logprobs is not None
    scored = client.score("base", [*PROMPT, *answer.token_ids]).tokens[len(PROMPT) :]
    # The log probabilities stay the model's own, as if nothing had been forbidden.
    for entry, reference in zip(answer.logprobs, scored, strict=False):
        assert entry.logprob == pytest.approx(reference.logprob, abs=1e-4)


async def test_forms_and_free_requests_share_a_batch(server: Server, client: Client) -> None:
    free = client.generate("base", PROMPT, max_tokens=24, ignore_eos=True).token_ids
    alone = {
        form: client.generate("base", PROMPT, max_tokens=120, temperature=1.0, seed=3, n=3, **options)
        for form, (options, _) in FORMS.items()
    }
    async with AsyncClient(address=server.address, timeout=START_SECONDS) as connected:
        tasks = [
            connected.generate("base", PROMPT, max_tokens=120, temperature=1.0, seed=3, n=3, **options)
            for options, _ in FORMS.values()
        ]
        plain = [connected.generate("base", PROMPT, max_tokens=24, ignore_eos=True) for _ in range(4)]
        answers = await asyncio.gather(*tasks, *plain)
    for (form, (_, accepts)), answer in zip(FORMS.items(), answers, strict=False):
        assert all(accepts(completion.text) for completion in answer.completions)
        assert [one.token_ids for one in answer.completions] == [one.token_ids for one in alone[form].completions]
    assert all(answer.token_ids == free for answer in answers[len(FORMS) :])


def test_json_is_compact_unless_the_schema_says_otherwise(client: Client) -> None:
    """For a model that likes nothing so much as a space: where white space is free, it writes nothing else."""
    (space,) = client.tokenize(" ").token_ids
    properties = {"name": {"enum": ["fox", "dog"]}, "sizes": {"const": [1, 2]}}
    schema = SCHEMA | {"properties": properties}

    def written(**guidance: Any) -> tuple[str, str]:
        asked = schema | ({"x-guidance": guidance} if guidance else {})
        answer = client.generate("base", PROMPT, json_schema=asked, max_tokens=120, logit_bias={space: 100.0})
        return answer.text, answer.finish_reason

    for guidance in ({}, {"coerce_one_of": True}):
        text, finish = written(**guidance)
        assert finish == "stop"
        assert text == json.dumps(json.loads(text)), "a space after each comma and colon, and no other"
    assert " " not in written(whitespace_flexible=False)[0]
    text, finish = written(whitespace_pattern="[ ]{1,3}")
    assert ("{   " in text, "    " in text, finish) == (True, False, "stop")
    text, finish = written(whitespace_flexible=True)
    assert (text.strip(), finish) == ("{", "length")


def test_a_choice_of_as_many_texts_as_there_may_be(client: Client) -> None:
    texts = [f"{'.*[(' if number % 2 else ''}one of {number:04d}\n|)" for number in range(1000)]
    several = client.generate("base", PROMPT, choice=texts, max_tokens=60, temperature=2.0, seed=1, n=8).completions
    assert {one.finish_reason for one in several} == {"stop"}
    assert len({one.text for one in several} & set(texts)) > 1
    assert {one.text for one in several} <= set(texts)
    # One that begins another: where it could go on, an end-of-sequence token ends it.
    chosen = {client.generate("base", PROMPT, choice=["a", "ab"], logit_bias={2: bias}).text for bias in (100, -100)}
    assert chosen == {"a", "ab"}


def test_max_tokens_cuts_it_and_says_so(client: Client) -> None:
    answer = client.generate("base", PROMPT, regex="[0-9]{50}", max_tokens=5)
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 5)
    assert re.fullmatch("[0-9]+", answer.text)


def test_where_nothing_is_allowed_it_says_so(client: Client) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(FailedPreconditionError) as caught:
            client.generate("base", PROMPT, regex="~{3}", bad_words=["~"], temperature=temperature)
        assert caught.value.reason == "NO_TOKEN_ALLOWED"


MANY_TERMINALS = "start: " + "|".join(f"T{i}" for i in range(1500))
MANY_TERMINALS += "".join(f"\nT{i}: /[a-z]+{i}/" for i in range(1500))

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"regex": "("}, "regex", "GRAMMAR_INVALID"),
    ({"regex": ""}, "regex", "INVALID_PARAMETER"),
    ({"regex": "x" * 8193}, "regex", "INVALID_PARAMETER"),
    ({"json_schema": "{"}, "json_schema", "INVALID_PARAMETER"),
    ({"json_schema": "[]"}, "json_schema", "INVALID_PARAMETER"),
    ({"json_schema": "[" * 50_000}, "json_schema", "INVALID_PARAMETER"),
    ({"json_schema": {"x": "y" * 70_000}}, "json_schema", "INVALID_PARAMETER"),
    ({"json_schema": {"type": "nothing"}}, "json_schema", "GRAMMAR_INVALID"),
    ({"json_schema": {"$ref": "http://127.0.0.1:1/schema"}}, "json_schema", "GRAMMAR_INVALID"),
    ({"choice": []}, "choice", "INVALID_PARAMETER"),
    ({"choice": ["a", ""]}, "choice.texts[1]", "INVALID_PARAMETER"),
    ({"choice": ["a"] * 1001}, "choice", "INVALID_PARAMETER"),
    ({"lark": "start: nothing_such"}, "lark", "GRAMMAR_INVALID"),
    ({"lark": "start: " + "(" * 20_000}, "lark", "GRAMMAR_INVALID"),
    # Bombs: refused when they are compiled, or in the step in which they take too much.
    ({"regex": "(a|b|[c-z]{0,9})" * 500}, "regex", ""),
    ({"lark": MANY_TERMINALS}, "lark", "GRAMMAR_TOO_COMPLEX"),
    (
        {"json_schema": {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949)]}},
        "json_schema",
        "GRAMMAR_INVALID",
    ),
]


@pytest.mark.parametrize(("options", "field", "reason"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_or_hostile_grammar_names_its_field(
    client: Client, options: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate("base", PROMPT, max_tokens=200, **options)
    assert [violation.field for violation in caught.value.field_violations] == [f"sampling.structured_output.{field}"]
    assert caught.value.reason == reason or (not reason and caught.value.reason.startswith("GRAMMAR_"))
    assert client.generate("base", PROMPT, max_tokens=1).token_ids


def test_an_empty_structured_output_is_refused(server: Server) -> None:
    import grpc

    request = pb.GenerateRequest(
        model="base", text="x", sampling=pb.SamplingParameters(structured_output=pb.StructuredOutput())
    )
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(GenerationServiceStub(channel).Generate(request, timeout=60))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_two_forms_exclude_each_other(client: Client) -> None:
    with pytest.raises(ValueError, match="json_schema and regex"):
        client.generate("base", PROMPT, regex="x", json_schema={})


def test_leaving_while_it_is_compiled_leaves_nothing(client: Client) -> None:
    for _ in range(5):
        with client.generate("base", PROMPT, lark=LARK + "\n" * 9, max_tokens=50, stream=True) as stream:
            next(stream)
    assert client.generate("base", PROMPT, lark=LARK, max_tokens=60).finish_reason == "stop"
