"""GenerationService over real gRPC: what it answers, what it refuses, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import math
import time

import grpc
import pytest
from tests.server import scripted_engine as script
from tests.waiting import until

from graftwork.v1 import generation_pb2 as pb


def request(text="a", model="base", **sampling) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, text=text, sampling=pb.SamplingParameters(**sampling))


def of_ids(*ids, model="base", **sampling) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParameters(**sampling))


async def test_text_comes_in_pieces_and_the_last_says_why_it_ended(shared):
    messages = [m async for m in shared.generation.Generate(request("xa", max_tokens=5))]
    assert "".join(m.text for m in messages) == "bcdef"
    assert [id for m in messages for id in m.token_ids] == list(b"bcdef")
    assert (messages[0].model, messages[0].version) == ("base", 0)
    last = messages[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.model) == (2, 5, "base")
    assert not any(m.finish_reason or m.HasField("usage") for m in messages[:-1])


async def test_the_end_of_sequence_token_counts_but_is_no_text(shared):
    messages = [m async for m in shared.generation.Generate(of_ids(script.EOS, 97, max_tokens=50))]
    assert "".join(m.text for m in messages) == "bc"
    assert [id for m in messages for id in m.token_ids] == [98, 99, script.EOS_ID]
    assert messages[-1].finish_reason == pb.FINISH_REASON_STOP
    assert messages[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("first", [ord("_"), script.FLOOD])
async def test_a_stop_text_ends_it_the_same_way_however_tokens_arrive(server, first):
    messages = [m async for m in server.generation.Generate(of_ids(first, 97, max_tokens=120, stop=["def", "zz"]))]
    assert "".join(m.text for m in messages) == "bc"
    assert [id for m in messages for id in m.token_ids] == list(b"bcdef")
    assert messages[-1].finish_reason == pb.FINISH_REASON_STOP
    assert messages[-1].usage.completion_tokens == 5
    if first != script.FLOOD:
        await until(lambda: server.heard("Cancel"))


async def test_logprobs_name_their_tokens(shared):
    messages = [m async for m in shared.generation.Generate(request(max_tokens=2, logprobs=2))]
    entries = [entry for m in messages for entry in m.logprobs]
    assert [(e.token_id, e.text, e.logprob) for e in entries] == [(98, "b", -0.25), (99, "c", -0.25)]
    assert [t.token_id for t in entries[0].top] == [98, 1]


async def test_defaults_are_filled_in(server):
    for _ in range(2):
        _ = [m async for m in server.generation.Generate(request("a" * 100))]
    first, second = server.heard("Generate")
    assert first["max_tokens"] == 28
    assert first["seed"] != second["seed"]
    _ = [m async for m in server.generation.Generate(request("a", max_tokens=1, seed=2**64 - 1))]
    assert server.heard("Generate")[-1]["seed"] == 2**64 - 1


async def test_chat_uses_the_template(server):
    messages = [pb.ChatMessage(role="user", content="hi")]
    call = server.generation.Chat(
        pb.ChatRequest(model="base", messages=messages, sampling=pb.SamplingParameters(max_tokens=2))
    )
    assert "".join([m.text async for m in call]) == ";<"
    assert bytes(server.heard("Generate")[0]["prompt"]) == b"user:hi;assistant:"


async def test_score(shared):
    answer = await shared.generation.Score(pb.ScoreRequest(model="base", text="abc", top_logprobs=1))
    assert [(t.token_id, t.text, t.HasField("logprob")) for t in answer.tokens] == [
        (97, "a", False),
        (98, "b", True),
        (99, "c", True),
    ]
    assert (answer.total_logprob, answer.model, answer.version) == (-1.0, "base", 0)
    assert len(answer.tokens[1].top) == 1
    # A whole context can be scored: nothing is to be generated.
    whole = await shared.generation.Score(pb.ScoreRequest(model="base", text="a" * 128))
    assert len(whole.tokens) == 128


async def test_tokenize(shared):
    answer = await shared.generation.Tokenize(pb.TokenizeRequest(text="héy"))
    assert bytes(answer.token_ids) == "héy".encode()
    assert list(answer.tokens) == ["h", "�", "�", "y"]
    assert answer.context_tokens == 128
    chat = await shared.generation.Tokenize(pb.TokenizeRequest(messages=[pb.ChatMessage(role="user", content="x")]))
    assert bytes(chat.token_ids) == b"user:x;assistant:"


# ---------------------------------------------------------------------------------------------- refusals

WRONG_SAMPLING = [
    ({"max_tokens": 0}, "sampling.max_tokens", "at least 1"),
    ({"max_tokens": -5}, "sampling.max_tokens", "at least 1"),
    ({"max_tokens": 128}, "sampling.max_tokens", "at most 127"),
    ({"max_tokens": 2**31 - 1}, "sampling.max_tokens", "at most 127"),
    ({"temperature": math.nan}, "sampling.temperature", "0 to 100"),
    ({"temperature": math.inf}, "sampling.temperature", "0 to 100"),
    ({"temperature": -0.1}, "sampling.temperature", "0 to 100"),
    ({"temperature": 101}, "sampling.temperature", "0 to 100"),
    ({"top_p": 0}, "sampling.top_p", "above 0"),
    ({"top_p": 1.1}, "sampling.top_p", "up to 1"),
    ({"top_p": math.nan}, "sampling.top_p", "above 0"),
    ({"top_k": -1}, "sampling.top_k", "300"),
    ({"top_k": 301}, "sampling.top_k", "300"),
    ({"logprobs": -1}, "sampling.logprobs", "0 to 20"),
    ({"logprobs": 21}, "sampling.logprobs", "0 to 20"),
    ({"stop": ["x"] * 17}, "sampling.stop", "at most 16"),
    ({"stop": ["x", ""]}, "sampling.stop[1]", "1 to 256"),
    ({"stop": ["x" * 257]}, "sampling.stop[0]", "1 to 256"),
]


@pytest.mark.parametrize(("sampling", "field", "accepted"), WRONG_SAMPLING)
async def test_a_parameter_out_of_range_is_named(shared, refused, sampling, field, accepted):
    chat = pb.ChatRequest(
        model="base",
        messages=[pb.ChatMessage(role="", content="")]
        if "skip" in sampling
        else [pb.ChatMessage(role="u", content="")],
        sampling=pb.SamplingParameters(**sampling),
    )
    error = await refused(shared.generation.Generate(request("a", **sampling)))
    assert error.code == "INVALID_ARGUMENT", error
    assert error.domain == "graftwork"
    assert accepted in error.fields[field], error
    assert field in (await refused(shared.generation.Chat(chat))).fields
    assert not shared.front.engine.running


async def test_all_wrong_fields_are_named_at_once(shared, refused):
    fields = {"temperature": -1, "top_p": 2, "max_tokens": 0, "n": 33, "best_of": 40, "prompt_logprobs": 21}
    sampling = pb.SamplingParameters(**fields, structured_output=pb.StructuredOutput())
    scheduling = {"cache_salt": "x" * 257, "priority": 101}
    named = {"cache_salt", "priority", "sampling.structured_output", *(f"sampling.{field}" for field in fields)}
    messages = [pb.ChatMessage(role="user", content="a")]
    for call in (
        shared.generation.Generate(pb.GenerateRequest(model="base", text="a", sampling=sampling, **scheduling)),
        shared.generation.Chat(pb.ChatRequest(model="base", messages=messages, sampling=sampling, **scheduling)),
    ):
        assert set((await refused(call)).fields) == named


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        (pb.GenerateRequest(model="base"), "prompt", "give text or token_ids"),
        (request(""), "text", "empty"),
        (of_ids(), "token_ids", "empty"),
        (request("a" * 128), "text", "at most 127"),
        (of_ids(*[1] * 128), "token_ids", "at most 127"),
        (of_ids(1, 300), "token_ids", "0 to 299"),
        (of_ids(1, 2**32 - 1), "token_ids", "position 1"),
        (request(model=""), "model", ""),
        (request(model="../x"), "model", ""),
        (request(model="base@1"), "model", ""),
        (request(model="x@0"), "model", ""),
        (request(model="x" * 5000), "model", ""),
    ],
)
async def test_a_wrong_prompt_or_model_is_named(shared, refused, wrong, field, words):
    error = await refused(shared.generation.Generate(wrong))
    assert error.code == "INVALID_ARGUMENT", error
    assert words in error.fields[field], error


@pytest.mark.parametrize("model", ["nobody", "nobody@3", "Base", "tuned.v2"])
async def test_an_unknown_adapter_is_never_answered_by_the_base(shared, refused, model):
    for call in (
        shared.generation.Generate(request(model=model)),
        shared.generation.Chat(pb.ChatRequest(model=model, messages=[pb.ChatMessage(role="u", content="x")])),
        shared.generation.Score(pb.ScoreRequest(model=model, text="x")),
    ):
        error = await refused(call)
        assert error.code == "NOT_FOUND", error


async def test_wrong_scores_chats_and_tokenizations_are_named(shared, refused):
    error = await refused(shared.generation.Score(pb.ScoreRequest(model="base", text="a", top_logprobs=21)))
    assert "0 to 20" in error.fields["top_logprobs"]
    error = await refused(shared.generation.Score(pb.ScoreRequest(model="base", text="a" * 129)))
    assert "at most 128" in error.fields["text"]
    error = await refused(shared.generation.Score(pb.ScoreRequest(model="base")))
    assert "input" in error.fields
    error = await refused(shared.generation.Chat(pb.ChatRequest(model="base")))
    assert (error.reason, list(error.fields)) == ("MESSAGES_EMPTY", ["messages"])
    error = await refused(shared.generation.Chat(pb.ChatRequest(model="base", messages=[pb.ChatMessage(content="x")])))
    assert "messages[0].role" in error.fields
    for wrong in (
        pb.TokenizeRequest(),
        pb.TokenizeRequest(text="x", messages=[pb.ChatMessage(role="u", content="x")]),
    ):
        assert (await refused(shared.generation.Tokenize(wrong))).code == "INVALID_ARGUMENT"


async def test_without_a_tokenizer_only_token_ids_work(make_server, refused):
    server = await make_server(options={"tokenizer_dir": None})
    error = await refused(server.generation.Generate(request("a")))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "TOKENIZER_MISSING")
    assert (await refused(server.generation.Tokenize(pb.TokenizeRequest(text="a")))).code == "FAILED_PRECONDITION"
    stop = await refused(server.generation.Generate(of_ids(1, stop=["x"])))
    assert stop.code == "FAILED_PRECONDITION"
    messages = [m async for m in server.generation.Generate(of_ids(1, max_tokens=2))]
    assert [id for m in messages for id in m.token_ids] == [2, 3]
    assert not any(m.text for m in messages)


async def test_without_a_chat_template_there_is_no_chat(make_server, refused, tokenizer_dir, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    server = await make_server(options={"tokenizer_dir": str(tmp_path / "tokenizer")})
    message = pb.ChatMessage(role="user", content="x")
    for call in (
        server.generation.Chat(pb.ChatRequest(model="base", messages=[message])),
        server.generation.Tokenize(pb.TokenizeRequest(messages=[message])),
    ):
        error = await refused(call)
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "NO_CHAT_TEMPLATE")


# ---------------------------------------------------------------------------------------------- ends


async def test_a_client_that_goes_away_cancels_at_once(server):
    call = server.generation.Generate(of_ids(script.HANG, 97, max_tokens=100))
    assert (await call.read()).text == "b"
    call.cancel()
    await until(lambda: server.heard("Cancel"))
    assert server.heard("Cancel")[0]["id"] == server.heard("Generate")[0]["id"]
    await until(lambda: server.front.engine.running == 0 and server.front.sequence_limit.held == 0)


async def test_a_client_that_goes_away_cancels_all_its_completions(server):
    call = server.generation.Generate(of_ids(script.HANG, 97, max_tokens=100, n=3))
    assert {(await call.read()).index for _ in range(3)} == {0, 1, 2}
    call.cancel()
    await until(lambda: len(server.heard("Cancel")) == 3)
    seeds = {entry["seed"] for entry in server.heard("Generate")}
    assert len(seeds) == 3
    await until(lambda: server.front.engine.running == 0 and server.front.sequence_limit.held == 0)


async def test_an_error_of_one_completion_ends_all(server, refused):
    error = await refused(server.generation.Generate(of_ids(script.FAIL, n=4)))
    assert error.reason == "KV_FULL"
    await until(lambda: server.front.engine.running == 0 and server.front.sequence_limit.held == 0)


async def test_a_deadline_cancels(server):
    call = server.generation.Generate(of_ids(script.HANG, 97, max_tokens=100), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [m async for m in call]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: server.heard("Cancel") and server.front.sequence_limit.held == 0)


async def test_a_score_whose_client_goes_away_cancels(server):
    call = server.generation.Generate(of_ids(script.HANG, 1, max_tokens=9))
    await call.read()
    call.cancel()
    await until(lambda: server.front.engine.running == 0)


async def test_an_error_of_the_engine_reaches_the_client(shared, refused):
    error = await refused(shared.generation.Generate(of_ids(script.FAIL)))
    assert (error.code, error.reason, error.message) == ("RESOURCE_EXHAUSTED", "KV_FULL", "no room")


async def test_a_crash_of_the_engine_is_unavailable_and_passes(server, refused):
    hanging = server.generation.Generate(of_ids(script.HANG, 97, max_tokens=100))
    await hanging.read()
    error = await refused(server.generation.Generate(of_ids(script.CRASH)))
    assert (error.code, error.reason) == ("UNAVAILABLE", "ENGINE_RESTARTING")
    assert error.retry_ms > 0
    assert (await refused(hanging)).code == "UNAVAILABLE"
    await until(lambda: server.front.engine.ready)
    messages = [m async for m in server.generation.Generate(request("a", max_tokens=1))]
    assert messages[-1].text == "b"


async def test_over_the_queue_it_is_refused_at_once(make_server, refused):
    server = await make_server(max_queue=3)
    calls = [server.generation.Generate(of_ids(script.HANG, 97, max_tokens=100)) for _ in range(3)]
    await asyncio.gather(*(call.read() for call in calls))
    begun = time.monotonic()
    error = await refused(server.generation.Generate(request("a")))
    assert time.monotonic() - begun < 0.25
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert error.retry_ms > 0
    for call in calls:
        call.cancel()
    await until(lambda: server.front.sequence_limit.held == 0)
    assert [m async for m in server.generation.Generate(request("a", max_tokens=1))]


async def test_each_sequence_of_a_request_has_a_place_in_the_queue(make_server, refused):
    server = await make_server(max_queue=5)
    call = server.generation.Generate(of_ids(script.HANG, 97, max_tokens=100, n=3))
    await call.read()
    error = await refused(server.generation.Generate(request("a", n=3)))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert error.retry_ms > 0
    assert [m async for m in server.generation.Generate(request("a", max_tokens=1, best_of=2))]
    error = await refused(server.generation.Generate(request("a", n=6)))
    assert error.fields == {"sampling.n": "is 6; 1 to 5 is accepted"}
    call.cancel()
    await until(lambda: server.front.sequence_limit.held == 0)


@pytest.mark.parametrize(
    ("field", "wrong", "accepted"),
    [("cache_salt", "x" * 257, "at most 256"), ("priority", 101, "-100 to 100"), ("priority", -101, "-100 to 100")],
)
async def test_salt_and_priority_have_their_ranges(shared, refused, field, wrong, accepted):
    generate = pb.GenerateRequest(model="base", text="a", **{field: wrong})
    chat = pb.ChatRequest(model="base", messages=[pb.ChatMessage(role="user", content="a")], **{field: wrong})
    for call in (shared.generation.Generate(generate), shared.generation.Chat(chat)):
        error = await refused(call)
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_PARAMETER")
        assert accepted in error.fields[field]


async def test_64_streams_at_once_get_their_own_tokens(server):
    async def one(n: int) -> bytes:
        call = server.generation.Generate(of_ids(n, max_tokens=50))
        return bytes([id async for m in call for id in m.token_ids])

    results = await asyncio.gather(*(one(n) for n in range(64)))
    assert results == [bytes(range(n + 1, n + 51)) for n in range(64)]
    assert server.front.sequence_limit.held == 0
