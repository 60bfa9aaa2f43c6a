"""Generate, chat, score and tokenize: what is sent, what comes back, and how a stream ends."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from tests.clients.protos import as_chat, last, piece
from tests.clients.scripted_server import ScriptedServer, fail, hold

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


def test_several_completions_are_put_together(server: ScriptedServer, client: graftwork.Client) -> None:
    def of(index: int, text: str, token: int, finish: int = 0, **fields: Any) -> g.GenerateResponse:
        return g.GenerateResponse(text=text, token_ids=[token], index=index, finish_reason=finish, **fields)

    stop, length = g.FINISH_REASON_STOP, g.FINISH_REASON_LENGTH
    usage = g.Usage(prompt_tokens=2, completion_tokens=4)
    prompt = [g.TokenLogprob(token_id=8, text="x")]
    answers = [of(1, "a", 1), of(0, "b", 2, prompt_logprobs=prompt), of(1, "c", 3, stop, score=-0.5)]
    server.on("Generate", [*answers, of(0, "d", 4, length, score=-1.5, usage=usage)])
    answer = client.generate("base", "x", n=2, best_of=2, prompt_logprobs=0)
    assert answer.completions == (
        graftwork.Completion(0, "bd", (2, 4), "length", None, -1.5),
        graftwork.Completion(1, "ac", (1, 3), "stop", None, -0.5),
    )
    assert (answer.text, answer.finish_reason, answer.usage) == ("bd", "length", graftwork.Usage(2, 4))
    assert answer.prompt_logprobs == (graftwork.TokenLogprob(8, "x", None),)
    server.on("Generate", [of(1, "a", 1), of(0, "d", 4, length, usage=usage)])
    with pytest.raises(graftwork.InternalError) as caught:
        client.generate("base", "x", n=2)
    assert caught.value.reason == "STREAM_TRUNCATED"


def test_an_option_that_there_is_not_is_refused(server: ScriptedServer, client: graftwork.Client) -> None:
    with pytest.raises(TypeError, match="there is no option 'top_q'; did you mean top_"):
        client.generate("base", "x", top_q=1)  # type: ignore[call-overload]


def test_unset_options_stay_unset(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [last()])
    client.generate("base", "hi")
    assert server.requests("Generate")[0] == g.GenerateRequest(model="base", text="hi", sampling=g.SamplingParameters())


def test_all_options_arrive(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [last()])
    client.generate(
        "base",
        [1, 2, 3],
        max_tokens=9,
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        seed=2**64 - 1,
        stop="END",
        logprobs=0,
        ignore_eos=True,
    )
    sampling = g.SamplingParameters(
        max_tokens=9, temperature=0.0, top_p=0.5, top_k=0, seed=2**64 - 1, stop=["END"], logprobs=0, ignore_eos=True
    )
    expected = g.GenerateRequest(model="base", token_ids=g.TokenIds(ids=[1, 2, 3]), sampling=sampling)
    assert server.requests("Generate")[0] == expected
    assert server.requests("Generate")[0].sampling.HasField("temperature")


def test_unknown_options_are_refused(client: graftwork.Client) -> None:
    with pytest.raises(TypeError, match="beam"):
        client.generate("base", "hi", beam=4)  # type: ignore[call-overload]


def test_empty_token_ids_reach_the_server_as_such(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [last()])
    client.generate("base", [])
    assert server.requests("Generate")[0].WhichOneof("prompt") == "token_ids"


def test_logprobs_are_given_if_asked_for(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [piece("a", 1, logprobs=[-0.5]), last()])
    answer = client.generate("base", "hi", logprobs=0)
    assert answer.logprobs == (graftwork.TokenLogprob(1, "a", -0.5, ()),)


def test_chunks_carry_the_model(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [piece("a", 1, model="dates", version=3), piece("b", 2), last(model="dates")])
    with client.generate("dates", "hi", stream=True) as stream:
        chunks = list(stream)
    assert [(chunk.model, chunk.version) for chunk in chunks] == [("dates", 3)] * 3
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "stop"]
    assert [chunk.usage for chunk in chunks] == [None, None, graftwork.Usage(2, 3)]


def test_result_after_some_chunks_is_the_whole(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Generate", [piece("a", 1), piece("b", 2), last("c", 3)])
    with client.generate("base", "hi", stream=True) as stream:
        next(stream)
        assert stream.result().text == "abc"
        assert stream.result().token_ids == (1, 2, 3)


@pytest.mark.parametrize("messages", [[], [piece("half an ans", 1)]])
def test_a_truncated_stream_is_no_success(
    server: ScriptedServer, client: graftwork.Client, messages: list[object]
) -> None:
    server.on("Generate", messages)  # type: ignore[arg-type]
    with pytest.raises(graftwork.InternalError) as caught:
        client.generate("base", "hi")
    assert caught.value.reason == "STREAM_TRUNCATED"
    assert caught.value.request_id == server.seen[0].metadata["x-request-id"]
    with pytest.raises(graftwork.InternalError):
        list(client.generate("base", "hi", stream=True))


async def test_a_truncated_async_stream_is_no_success(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    server.on("Generate", [piece("half", 1)])
    with pytest.raises(graftwork.InternalError):
        await aclient.generate("base", "hi")


def test_closing_ends_the_call_on_the_server(server: ScriptedServer, client: graftwork.Client) -> None:
    gone = threading.Event()
    server.on("Generate", hold([piece("a", 1)], gone))
    stream = client.generate("base", "hi", stream=True)
    assert next(stream).text == "a"
    stream.close()
    assert gone.wait(10)
    assert list(stream) == []
    with pytest.raises(graftwork.InternalError):
        stream.result()


def test_leaving_the_block_ends_the_call(server: ScriptedServer, client: graftwork.Client) -> None:
    gone = threading.Event()
    server.on("Chat", hold([as_chat(piece("a", 1))], gone))
    with client.chat("base", [{"role": "user", "content": "hi"}], stream=True) as stream:
        next(stream)
    assert gone.wait(10)


def test_closing_from_another_thread_ends_the_iteration(server: ScriptedServer, client: graftwork.Client) -> None:
    gone = threading.Event()
    server.on("Generate", hold([piece("a", 1)], gone))
    stream = client.generate("base", "hi", stream=True)
    threading.Timer(0.3, stream.close).start()
    assert [chunk.text for chunk in stream] == ["a"]
    assert gone.wait(10)


async def test_async_closing_ends_the_call(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    gone = threading.Event()
    server.on("Generate", hold([piece("a", 1)], gone))
    async with await aclient.generate("base", "hi", stream=True) as stream:
        assert (await anext(stream)).text == "a"
    assert await asyncio.to_thread(gone.wait, 10)
    assert [chunk async for chunk in stream] == []


async def test_cancelling_the_task_ends_the_call(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    gone = threading.Event()
    arrived = threading.Event()
    server.on("Generate", hold([piece("a", 1)], gone, arrived))
    task = asyncio.create_task(aclient.generate("base", "hi"))
    assert await asyncio.to_thread(arrived.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(gone.wait, 10)


async def test_async_answers_are_the_same(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    server.on("Generate", [piece("a", 1), last("b", 2)])
    server.on("Chat", [as_chat(piece("a", 1)), as_chat(last("b", 2))])
    generated = await aclient.generate("base", "hi", seed=1)
    answered = await aclient.chat("base", [{"role": "user", "content": "hi"}], seed=1)
    assert generated == answered
    assert generated.text == "ab"
    stream = await aclient.generate("base", "hi", stream=True)
    assert [chunk.text async for chunk in stream] == ["a", "b"]


def test_chat_sends_the_conversation(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Chat", [as_chat(last("Hello"))])
    conversation = [graftwork.Message(role="system", content="Be brief."), {"role": "user", "content": "Hi"}]
    assert client.chat("base", conversation, max_tokens=5).text == "Hello"
    request = server.requests("Chat")[0]
    assert [(m.role, m.content) for m in request.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert request.sampling.max_tokens == 5


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


async def test_a_stream_needs_no_second_await(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    server.on("Generate", [piece("a", 1), last("b", 2)])
    server.on("Chat", [as_chat(last("c", 2))])
    async with aclient.generate("base", "hi", stream=True) as stream:
        assert [chunk.text async for chunk in stream] == ["a", "b"]
    async for chunk in aclient.chat("base", [{"role": "user", "content": "hi"}], stream=True):
        assert chunk.text == "c"
    stream = await aclient.generate("base", "hi", stream=True)
    assert (await stream.result()).text == "ab"


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "user", "contents": "hi"}, r"messages\[0\] has 'contents'; a message has role, content"),
        ({"role": "user"}, r'messages\[0\] has no "content"'),
        ({"content": "hi"}, r'messages\[0\] has no "role"'),
    ],
)
def test_a_message_that_says_nothing_is_refused(client: graftwork.Client, message: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        client.chat("base", [message])


def test_a_message_of_calls_needs_no_content(server: ScriptedServer, client: graftwork.Client) -> None:
    """As other APIs write them, with what is null or empty left in."""
    server.on("Chat", [as_chat(last("c", 2))])
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    client.chat("base", [{"role": "assistant", "tool_calls": calls, "refusal": None, "annotations": []}])


def test_content_is_a_list_of_text_parts(server: ScriptedServer, client: graftwork.Client) -> None:
    server.on("Chat", [as_chat(last("c", 2))])
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    client.chat("base", [{"role": "user", "content": parts}])
    assert server.requests("Chat")[0].messages[0].content == "Hello"
