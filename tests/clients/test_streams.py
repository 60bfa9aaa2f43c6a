"""Generations as they come: how the pieces are put together, and how a stream ends."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from tests.clients.protos import as_chat, last, piece
from tests.clients.scripted_server import ScriptedServer, hold

import graftwork
from graftwork.v1 import generation_pb2 as g


def test_several_completions_are_put_together(server: ScriptedServer, client: graftwork.Client) -> None:
    def of(
        index: int,
        text: str,
        token: int,
        finish: g.FinishReason.ValueType = g.FINISH_REASON_UNSPECIFIED,
        **fields: Any,
    ) -> g.GenerateResponse:
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


async def test_a_stream_needs_no_second_await(server: ScriptedServer, aclient: graftwork.AsyncClient) -> None:
    server.on("Generate", [piece("a", 1), last("b", 2)])
    server.on("Chat", [as_chat(last("c", 2))])
    async with aclient.generate("base", "hi", stream=True) as stream:
        assert [chunk.text async for chunk in stream] == ["a", "b"]
    async for chunk in aclient.chat("base", [{"role": "user", "content": "hi"}], stream=True):
        assert chunk.text == "c"
    stream = await aclient.generate("base", "hi", stream=True)
    assert (await stream.result()).text == "ab"
