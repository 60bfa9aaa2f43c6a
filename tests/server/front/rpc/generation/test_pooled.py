"""Classify and Embed over real gRPC with the scripted engine: every field, caps, and what bad input is told."""

from __future__ import annotations

import math

import pytest
from tests.server import scripted_engine as script
from tests.waiting import until

from graftwork.v1 import generation_pb2 as pb
from graftwork.v1 import tuning_pb2
from graftwork_server.front.rpc.generation import pooled

LABELS = ["good", "bad", "ugly"]


def text(value: str, pair: str = "") -> pb.TextInput:
    return pb.TextInput(text=value, text_pair=pair)


def ids(*values: int) -> pb.TextInput:
    return pb.TextInput(token_ids=pb.TokenIds(ids=values))


def classify(*inputs: pb.TextInput, model: str = "base") -> pb.ClassifyRequest:
    return pb.ClassifyRequest(model=model, inputs=inputs)


def embed(*inputs: pb.TextInput, **fields) -> pb.EmbedRequest:
    return pb.EmbedRequest(model="base", inputs=inputs, **fields)


async def test_every_label_has_its_logit_and_its_softmax(make_server):
    server = await make_server({"labels": LABELS})
    answer = await server.generation.Classify(classify(text("ab"), ids(5), text("cde")))
    assert (answer.problem_type, answer.model, answer.version) == (pb.PROBLEM_TYPE_SINGLE_LABEL, "base", 0)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 0)
    assert [result.input_tokens for result in answer.results] == [2, 1, 3]
    for result in answer.results:
        assert [score.label for score in result.labels] == LABELS
        logits = [float(result.input_tokens + index) for index in range(3)]
        assert [score.logit for score in result.labels] == logits
        total = sum(map(math.exp, logits))
        expected = [math.exp(logit) / total for logit in logits]
        assert [score.probability for score in result.labels] == pytest.approx(expected, abs=1e-12)
        assert result.predicted_label == "ugly"
    heard = server.heard("Generate")
    assert sorted(bytes(entry["prompt"]) for entry in heard) == [b"\x05", b"ab", b"cde"]
    assert {entry["max_tokens"] for entry in heard} == {0}
    assert [entry["pool"][0] for entry in heard] == ["classify"] * 3


@pytest.mark.parametrize(
    ("problem_type", "value", "predicted"),
    [
        ("multi_label_classification", pb.PROBLEM_TYPE_MULTI_LABEL, "ugly"),
        ("regression", pb.PROBLEM_TYPE_REGRESSION, ""),
    ],
)
async def test_the_problem_type_says_what_logits_mean(make_server, problem_type, value, predicted):
    server = await make_server({"labels": LABELS, "problem_type": problem_type})
    answer = await server.generation.Classify(classify(ids(7)))
    assert answer.problem_type == value
    (result,) = answer.results
    assert result.predicted_label == predicted
    if predicted:
        expected = [1 / (1 + math.exp(-score.logit)) for score in result.labels]
        assert [score.probability for score in result.labels] == pytest.approx(expected, abs=1e-12)
    else:
        assert not any(score.HasField("probability") for score in result.labels)


def test_probabilities_of_large_logits_do_not_overflow():
    assert pooled._probabilities([-3e38, 3e38], "multi_label_classification") == [0.0, 1.0]
    assert pooled._probabilities([-3e38, 3e38], "single_label_classification") == [0.0, 1.0]


async def test_vectors_come_with_how_they_were_made(server):
    answer = await server.generation.Embed(embed(text("ab"), ids(1, 2, 3)))
    assert [list(one.values) for one in answer.embeddings] == [[97, 98, 0, 0, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert [one.input_tokens for one in answer.embeddings] == [2, 3]
    assert (answer.pooling, answer.model, answer.version, answer.usage.prompt_tokens) == (pb.POOLING_LAST, "base", 0, 5)
    answer = await server.generation.Embed(embed(ids(9, 8), pooling=pb.POOLING_CLS, normalize=False, dimensions=1))
    assert list(answer.embeddings[0].values) == [9]
    assert answer.pooling == pb.POOLING_CLS
    assert [entry["pool"] for entry in server.heard("Generate")] == [["embed", "last", True]] * 2 + [
        ["embed", "cls", False]
    ]


async def test_a_pair_is_joined_by_the_tokenizer(server):
    answer = await server.generation.Embed(embed(text("ab", "cd"), text("e")))
    assert [one.input_tokens for one in answer.embeddings] == [4, 1]
    heard = sorted(server.heard("Generate"), key=lambda entry: len(entry["prompt"]))
    assert [(bytes(entry["prompt"]), entry["types"]) for entry in heard] == [(b"e", []), (b"abcd", [0, 0, 1, 1])]


async def test_without_a_head_it_is_a_failed_precondition(shared, refused):
    error = await refused(shared.generation.Classify(classify(text("a"))))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "HEAD_MISSING")


WRONG = {
    "no inputs": (classify(), "inputs", "INVALID_PARAMETER", "has 0 texts; 1 to 256 are accepted"),
    "too many": (classify(*[ids(1)] * 257), "inputs", "INVALID_PARAMETER", "has 257 texts"),
    "nothing": (classify(text("a"), pb.TextInput()), "inputs[1]", "PROMPT_EMPTY", "give text or token_ids"),
    "empty text": (classify(text("")), "inputs[0].text", "PROMPT_EMPTY", "inputs[0] is empty"),
    "no ids": (classify(pb.TextInput(token_ids=pb.TokenIds())), "inputs[0].token_ids", "PROMPT_EMPTY", "at least one"),
    "a strange id": (classify(ids(1), ids(2, 300)), "inputs[1].token_ids", "TOKEN_ID_OUT_OF_RANGE", "0 to 299"),
    "too long": (embed(text("a" * 129)), "inputs[0].text", "PROMPT_TOO_LONG", "129 tokens; at most 128"),
    "pair of ids": (
        embed(pb.TextInput(token_ids=pb.TokenIds(ids=[1]), text_pair="b")),
        "inputs[0].text_pair",
        "INVALID_PARAMETER",
        "goes with text alone",
    ),
    "pooling": (embed(ids(1), pooling=9), "pooling", "INVALID_PARAMETER", "POOLING_MEAN, POOLING_CLS, POOLING_LAST"),
    "several": (embed(ids(1), pooling=pb.POOLING_SEVERAL), "pooling", "INVALID_PARAMETER", "POOLING_WEIGHTED_MEAN"),
    "no dimensions": (embed(ids(1), dimensions=0), "dimensions", "INVALID_PARAMETER", "is 0; 1 to 8 is accepted"),
    "dimensions": (embed(ids(1), dimensions=9), "dimensions", "INVALID_PARAMETER", "is 9; 1 to 8"),
}


@pytest.mark.parametrize("case", list(WRONG))
async def test_bad_input_is_named(shared, refused, case):
    request, field, reason, what = WRONG[case]
    method = shared.generation.Classify if isinstance(request, pb.ClassifyRequest) else shared.generation.Embed
    error = await refused(method(request))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", reason)
    assert what in error.fields[field]
    assert not shared.front.sequence_limit.held


async def test_tokens_and_labels_are_capped_in_all(make_server, refused, monkeypatch):
    server = await make_server({"labels": LABELS})
    monkeypatch.setattr(pooled, "MAX_INPUT_TOKENS", 5)
    error = await refused(server.generation.Embed(embed(ids(1, 2, 3), ids(1, 2, 3))))
    assert error.fields == {"inputs": "has 6 tokens in all; at most 5 are accepted"}
    assert not server.heard("Generate")
    monkeypatch.setattr(pooled, "MAX_LABEL_SCORES", 5)
    error = await refused(server.generation.Classify(classify(ids(1), ids(1))))
    assert error.fields == {"inputs": "has 2 texts; at most 1 are accepted, as the head has 3 labels"}


async def test_a_long_list_is_answered_in_order(server):
    answer = await server.generation.Embed(embed(*[ids(number, 1) for number in range(pooled.MAX_INPUTS)]))
    assert [one.values[0] for one in answer.embeddings] == list(range(pooled.MAX_INPUTS))


async def test_the_first_error_ends_all_inputs(server, refused):
    error = await refused(server.generation.Embed(embed(ids(1), ids(script.FAIL), ids(2))))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "KV_FULL")
    await until(lambda: server.front.engine.running == 0)
    assert not server.front.sequence_limit.held


async def test_what_the_files_ask_for_and_is_not_done_is_refused_unless_a_pooling_is_named(make_server, refused):
    server = await make_server({"undone_pooling": "Dense (2_Dense) in modules.json"})
    error = await refused(server.generation.Embed(embed(ids(1))))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "POOLING_UNSUPPORTED")
    assert "Dense (2_Dense)" in error.message
    assert "weightedmean" in error.message
    answer = await server.generation.Embed(embed(ids(1), pooling=pb.POOLING_WEIGHTED_MEAN))
    assert answer.pooling == pb.POOLING_WEIGHTED_MEAN
    assert [entry["pool"][1] for entry in server.heard("Generate")] == ["weightedmean"]


async def test_several_poolings_of_the_files_are_said_and_make_longer_vectors(make_server, refused):
    server = await make_server({"default_pooling": "max+mean"})
    answer = await server.generation.Embed(embed(ids(1), dimensions=16))
    assert answer.pooling == pb.POOLING_SEVERAL
    error = await refused(server.generation.Embed(embed(ids(1), dimensions=17)))
    assert error.fields == {"dimensions": "is 17; 1 to 16 is accepted"}


async def test_an_unknown_name_is_never_the_base(shared, refused):
    error = await refused(shared.generation.Classify(classify(ids(1), model="nobody")))
    assert (error.code, error.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")


async def test_an_encoder_does_not_generate(make_server, refused):
    server = await make_server({"generates": False, "labels": LABELS})
    calls = [
        server.generation.Generate(pb.GenerateRequest(model="base", text="a")),
        server.generation.Chat(pb.ChatRequest(model="base", messages=[pb.ChatMessage(role="user", content="a")])),
        server.generation.Score(pb.ScoreRequest(model="base", text="a")),
        server.tuning.CreateTuningJob(
            tuning_pb2.CreateTuningJobRequest(
                spec=tuning_pb2.TuningJobSpec(strategy="lora", dataset="datasets/x", adapter_id="y")
            )
        ),
    ]
    for call, name in zip(calls, ("Generate", "Chat", "Score", "tuning"), strict=True):
        error = await refused(call)
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "BASE_IS_ENCODER")
        assert f"an encoder, which {name} cannot use; Classify" in error.message
    assert (await server.generation.Classify(classify(text("a")))).results
    assert (await server.generation.Embed(embed(text("a")))).embeddings
    assert (await server.generation.Tokenize(pb.TokenizeRequest(text="ab"))).context_tokens == 128
