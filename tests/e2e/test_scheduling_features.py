"""Who runs when, over gRPC on servers that are short of something: priority, shares, preemption, a full queue,
unloading under a stream, and tokens that come several in a message."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests import toys
from tests.e2e.reference import PROMPT
from tests.e2e.serving import START_SECONDS, Server, eventually

from graftwork import AsyncClient, Client, ResourceExhaustedError

KV_BYTES = 2 * 3 * 2 * 8 * 4
"""Of one token of the toy model: keys and values, layers, heads of them, elements, bytes."""


@pytest.fixture(scope="module")
def narrow(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs one sequence at a time and queues two requests beside it, with two adapters."""
    folder = tmp_path_factory.mktemp("narrow")
    running = Server(model_dir, folder / "data", "--max-sequences", "1", "--max-queue", "16")
    with running.client() as client:
        for seed, name in enumerate(("greedy", "modest")):
            client.adapters.create(name, toys.make_adapter(model_dir, folder / name, seed), load=True)
    yield running
    running.close()


async def finishing_order(server: Server, requests: list[tuple[str, str, int]]) -> list[str]:
    """Labels of requests in the order in which they end. All are queued while a long stream holds the only place."""
    ended: list[str] = []
    async with AsyncClient(address=server.address, timeout=START_SECONDS, max_retries=0) as client:

        async def ask(label: str, model: str, priority: int) -> None:
            await client.generate(model, PROMPT, max_tokens=8, ignore_eos=True, priority=priority)
            ended.append(label)

        holder = await client.generate("base", PROMPT, max_tokens=900_000, ignore_eos=True, stream=True)
        async with holder:
            await anext(holder)
            tasks = []
            for request in requests:
                tasks.append(asyncio.create_task(ask(*request)))
                await asyncio.sleep(0.1)  # so that they arrive in this order
            await asyncio.sleep(2)  # and all are there, however busy the machine is
        await asyncio.gather(*tasks)
    return ended


async def test_a_higher_priority_begins_first(narrow: Server) -> None:
    requests = [("low", "base", -5), ("usual", "base", 0), ("high", "base", 90), ("highest", "base", 100)]
    assert await finishing_order(narrow, requests) == ["highest", "high", "usual", "low"]


def test_threads_of_the_engine_sleep_soon_while_they_wait(narrow: Server) -> None:
    """Beside a process of others that keeps a core busy, a spinning thread holds up the one it waits for."""
    engine = narrow.engine()
    assert engine is not None
    assert engine.environ()["GOMP_SPINCOUNT"] == os.environ.get("GOMP_SPINCOUNT", "1000")


async def test_one_adapters_queue_does_not_hold_up_another(narrow: Server) -> None:
    requests = [(f"greedy {number}", "greedy", 0) for number in range(8)] + [("modest", "modest", 0)]
    order = await finishing_order(narrow, requests)
    assert sorted(order) == sorted(label for label, _, _ in requests)
    assert order.index("modest") <= 2, order


async def test_a_full_queue_says_when_to_come_again(narrow: Server) -> None:
    async with AsyncClient(address=narrow.address, timeout=START_SECONDS, max_retries=0) as client:
        answers = await asyncio.gather(
            *(client.generate("base", PROMPT, max_tokens=30, ignore_eos=True) for _ in range(100)),
            return_exceptions=True,
        )
        refused = [answer for answer in answers if isinstance(answer, ResourceExhaustedError)]
        served = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert len(refused) + len(served) == 100
        assert len(served) >= 16
        assert refused
        assert {error.reason for error in refused} == {"QUEUE_FULL"}
        assert all(error.retry_after_ms for error in refused)
        assert len({answer.token_ids for answer in served}) == 1
        assert (await client.generate("base", PROMPT, max_tokens=2)).token_ids


async def test_preempted_requests_end_as_if_alone(model_dir: Path, tmp_path: Path, client: Client) -> None:
    """Eight sequences of 100 tokens and more in a cache that holds 256."""
    prompts = [[*PROMPT, 30 + number] for number in range(8)]
    small = Server(model_dir, tmp_path / "data", "--kv-memory-bytes", str(256 * KV_BYTES), "--no-prefix-cache")
    try:
        async with AsyncClient(address=small.address, timeout=START_SECONDS, max_retries=0) as connected:
            answers = await asyncio.gather(
                *(connected.generate("base", prompt, max_tokens=100, ignore_eos=True) for prompt in prompts)
            )
    finally:
        small.close()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.finish_reason == "length"
        assert answer.token_ids == client.generate("base", prompt, max_tokens=100, ignore_eos=True).token_ids


def test_an_unload_waits_for_the_stream_that_uses_it(client: Client, model_dir: Path, tmp_path: Path) -> None:
    client.adapters.create("leaving", toys.make_adapter(model_dir, tmp_path / "leaving", seed=31), load=True)
    expected = client.generate("leaving", PROMPT, max_tokens=400, ignore_eos=True).token_ids
    with ThreadPoolExecutor(1) as threads:
        with client.generate("leaving", PROMPT, max_tokens=400, ignore_eos=True, stream=True) as stream:
            tokens = list(next(stream).token_ids)
            unloading = threads.submit(client.adapters.unload, "leaving")
            for chunk in stream:
                tokens += chunk.token_ids
        unloading.result(START_SECONDS)
    assert tuple(tokens) == tuple(expected)
    eventually(lambda: not client.adapters.get("leaving").loaded, "the adapter to be unloaded")
    assert client.generate("leaving", PROMPT, max_tokens=400, ignore_eos=True).token_ids == expected


def test_tokens_come_several_in_a_message_where_messages_are_dear(
    client: Client, model_dir: Path, tmp_path: Path
) -> None:
    expected = client.generate("base", PROMPT, max_tokens=600, ignore_eos=True, logprobs=1)
    slow = Server(model_dir, tmp_path / "data", "--messages-per-second", "20")
    try:
        with (
            slow.client() as connected,
            connected.generate("base", PROMPT, max_tokens=600, ignore_eos=True, logprobs=1, stream=True) as stream,
        ):
            chunks = list(stream)
    finally:
        slow.close()
    assert len(chunks) > 1
    assert max(len(chunk.token_ids) for chunk in chunks) > 1
    assert [token for chunk in chunks for token in chunk.token_ids] == list(expected.token_ids)
    assert "".join(chunk.text for chunk in chunks) == expected.text
    entries = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    assert [entry.token_id for entry in entries] == list(expected.token_ids)
