"""Several sequences read as one stream: each can be ended by itself, and none is left running."""

from __future__ import annotations

import asyncio

import pytest

from graftwork_server.front.rpc.generation.samples import Samples, samplings_of
from graftwork_server.wire.engine import Sampling, SequenceOutput


class Sequences:
    """Stands for the engine: each sequence yields its seed for ever, and is known while it runs."""

    def __init__(self, fail: int | None = None) -> None:
        self.running: set[int] = set()
        self.firsts: list[bool] = []
        self.fail = fail

    async def start(self, sampling: Sampling, first: bool):
        self.running.add(sampling.seed)
        self.firsts.append(first)
        try:
            while True:
                await asyncio.sleep(0)
                if sampling.seed == self.fail:
                    raise ValueError("no room")
                yield SequenceOutput(sampling.seed, [sampling.seed])
        finally:
            self.running.discard(sampling.seed)


def samplings(count: int) -> list[Sampling]:
    return [Sampling(max_tokens=1, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_all_run_side_by_side_and_none_is_left(count):
    engine = Sequences()
    met = set()
    async with Samples(engine.start, samplings(count)) as samples:
        async for index, output in samples:
            assert output.id == index
            met.add(index)
            if len(met) == count:
                break
        assert engine.running == set(range(count))
    assert not engine.running
    assert engine.firsts == [True] + [False] * (count - 1)


async def test_one_is_ended_and_the_others_go_on():
    engine = Sequences()
    async with Samples(engine.start, samplings(3)) as samples:
        after = total = 0
        async for index, _ in samples:
            total += 1
            assert total < 5000, "the one that was ended still runs"
            if index == 1 and 1 in engine.running:
                samples.end(1)
            after += index != 1 and 1 not in engine.running
            if after > 20:
                break
        assert engine.running == {0, 2}
    assert not engine.running


async def test_an_error_ends_all():
    engine = Sequences(fail=2)

    async def read() -> None:
        async with Samples(engine.start, samplings(3)) as samples:
            async for _ in samples:
                pass

    with pytest.raises(ValueError, match="no room"):
        await read()
    assert not engine.running


@pytest.mark.parametrize("how", ["returns", "is cancelled"])
@pytest.mark.parametrize("stopped", [0, 1])
async def test_a_sequence_that_ends_early_is_not_waited_for(how: str, stopped: int):
    """Whatever was ended before: the reader is not left waiting for one that says nothing more."""

    async def start(sampling: Sampling, first: bool):
        yield SequenceOutput(sampling.seed, [sampling.seed])
        if sampling.seed == stopped:
            await asyncio.Event().wait()
        if how == "is cancelled":
            raise asyncio.CancelledError

    async def read() -> list[int]:
        async with Samples(start, samplings(3)) as samples:
            met = []
            async for index, _ in samples:
                met.append(index)
                if index == stopped:
                    samples.end(index)
            return met

    assert sorted(await asyncio.wait_for(read(), 30)) == [0, 1, 2]


async def test_a_cancelled_reader_leaves_none():
    engine = Sequences()
    all_run = asyncio.Event()

    async def read() -> None:
        async with Samples(engine.start, samplings(4)) as samples:
            async for _ in samples:
                if len(engine.running) == 4:
                    all_run.set()
                    await asyncio.sleep(3600)

    task = asyncio.create_task(read())
    await all_run.wait()
    task.cancel()
    await asyncio.wait({task})
    assert not engine.running


def test_seeds_are_different_and_the_same_again():
    first, *others = samplings_of(Sampling(max_tokens=1, seed=2**64 - 1, temperature=0.5), 32)
    assert first.seed == 2**64 - 1
    seeds = [one.seed for one in (first, *others)]
    assert len(set(seeds)) == 32
    assert all(one.temperature == 0.5 for one in others)
    assert seeds == [one.seed for one in samplings_of(first, 32)]
    assert not set(seeds[1:]) & {one.seed for one in samplings_of(Sampling(max_tokens=1, seed=1), 32)}
