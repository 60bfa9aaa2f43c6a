"""Generate, chat, score and tokenize: what is sent, what comes back."""

from __future__ import annotations

import grpc
import pytest
from tests.clients.protos import as_chat, last, piece
from tests.clients.scripted_server import ScriptedServer, fail

import graftwork
from graftwork.v1 import generation_pb2 as g


def test_whole_answer(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [piece("Once ", 5, model="dates", version=3), piece("up", 6), last("on", 7, model="dates")])
    answer = client.generate("dates@3", "Say")
    assert answer == graftwork.Generation(
        text="Once upon",
        token_ids=(5, 6, 7),
        finish_reason="stop",
        logprobs=None,
        usage=graftwork.Usage(2, 3),
        model="dates",
        version=3,
        completions=(graftwork.Completion(0, "Once upon", (5, 6, 7), "stop", None, None),),
    )


def test_empty_token_ids_reach_the_server_as_such(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [last()])
    client.generate("base", [])
    assert server.requests("Generate")[0].WhichOneof("prompt") == "token_ids"


def test_logprobs_are_given_if_asked_for(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [piece("a", 1, logprobs=[-0.5]), last()])
    answer = client.generate("base", "hi", logprobs=0)
    assert answer.logprobs == (graftwork.TokenLogprob(1, "a", -0.5, ()),)


async def test_async_answers_are_the_same(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    server.on("Generate", [piece("a", 1), last("b", 2)])
    server.on("Chat", [as_chat(piece("a", 1)), as_chat(last("b", 2))])
    generated = await aclient.generate("base", "hi", seed=1)
    answered = await aclient.chat("base", [{"role": "user", "content": "hi"}], seed=1)
    assert generated == answered
    assert generated.text == "ab"
    stream = await aclient.generate("base", "hi", stream=True)
    assert [chunk.text async for chunk in stream] == ["a", "b"]


def test_score(server: ScriptedServer, client: graftwork.Client) -> None:
    top = [g.TopLogprob(token_id=4, text="x", logprob=-0.1)]
    entries = [g.TokenLogprob(token_id=1, text="a"), g.TokenLogprob(token_id=2, text="b", logprob=-2.0, top=top)]
    server.on("Score", g.ScoreResponse(tokens=entries, total_logprob=-2.0, model="base"))
    result = client.score("base", "ab", top_logprobs=1)
    assert result.tokens[0].logprob is None
    assert result.tokens[1] == graftwork.TokenLogprob(2, "b", -2.0, (graftwork.TopLogprob(4, "x", -0.1),))
    assert (result.total_logprob, result.model, result.version) == (-2.0, "base", 0)
    assert server.requests("Score")[0] == g.ScoreRequest(model="base", text="ab", top_logprobs=1)


async def test_tokenize(server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient) -> None:
    server.on("Tokenize", g.TokenizeResponse(token_ids=[1, 2], tokens=["a", "b"], context_tokens=512))
    expected = graftwork.Tokenization((1, 2), ("a", "b"), 512)
    assert client.tokenize("ab") == expected
    assert await aclient.tokenize([{"role": "user", "content": "ab"}]) == expected
    assert [bool(request.messages) for request in server.requests("Tokenize")] == [False, True]


async def test_a_list_of_prompts_gives_a_list_of_generations(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    def echo(request: g.GenerateRequest, context: grpc.ServicerContext) -> list[g.GenerateResponse]:
        return [last(f"<{request.text or list(request.token_ids.ids)}>", 1)]

    server.on("Generate", echo)
    prompts = [f"p{number}" for number in range(40)]
    texts = [f"<{prompt}>" for prompt in prompts]
    assert [one.text for one in client.generate("base", prompts, max_tokens=1)] == texts
    assert [one.text for one in await aclient.generate("base", prompts, max_tokens=1)] == texts
    assert [one.text for one in client.generate("base", [[1, 2], [3]])] == ["<[1, 2]>", "<[3]>"]
    assert [one.text for one in client.generate("base", ["one"])] == ["<one>"]
    assert client.generate("base", [1, 2]).text == "<[1, 2]>"


async def test_one_error_of_several_prompts_is_raised(
    server: ScriptedServer, client: graftwork.Client, aclient: graftwork.AsyncClient
) -> None:
    server.on("Generate", fail(grpc.StatusCode.NOT_FOUND, "no x"))
    with pytest.raises(graftwork.NotFoundError):
        client.generate("x", ["a", "b"])
    with pytest.raises(graftwork.NotFoundError):
        await aclient.generate("x", ["a", "b"])
