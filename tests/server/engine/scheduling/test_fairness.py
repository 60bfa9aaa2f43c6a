"""Whose turn it is, counted in steps: shares of adapters, priorities, and more adapters than fit the device."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import toys
from tests.server.engine.harness import Harness, Reference, StepLoader, deltas_of

from graftwork_server.engine.scheduling.fairness import AdapterQueue, FairQueue, Turns
from graftwork_server.engine.scheduling.sequence import Sequence
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.types import AdapterRef
from graftwork_server.wire.engine import Generate, Sampling, SequenceOutput

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


class Traffic:
    """Requests that arrive at given steps, and in which step each got its first token and its last."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.arrivals: dict[int, list[tuple[int, AdapterRef | None, dict[str, Any]]]] = defaultdict(list)
        self.arrived: dict[int, int] = {}
        self.first: dict[int, int] = {}
        self.counters: dict[int, dict[str | None, int]] = {}
        """By request: the virtual token counters when it arrived."""
        self._next = 0

    def plan(self, step: int, adapter: AdapterRef | None, count: int = 1, **options: Any) -> list[int]:
        """`count` requests in a step; their ids."""
        numbers = list(range(self._next, self._next + count))
        self._next += count
        self.arrivals[step] += [(number, adapter, options) for number in numbers]
        return numbers

    def step(self) -> list[SequenceOutput]:
        """What arrives now, then a step."""
        now = self.harness.steps
        for number, adapter, options in self.arrivals.pop(now, []):
            self.arrived[number] = now
            self.harness.add(number, [*PROMPT, 3 + number % 100], adapter, **({"max_tokens": 8} | options))
            clients = self.harness.engine._admission._queue._queues.values()
            self.counters[number] = {client.digest: client.counter for client in clients}
        outputs = self.harness.step()
        for output in outputs:
            self.first.setdefault(output.id, now)
        return outputs

    def run(self) -> None:
        """To the end."""
        while self.arrivals or self.harness.engine.active:
            self.step()
            assert self.harness.steps < 5000

    def waits(self, numbers: list[int]) -> list[int]:
        """Steps from arrival to first token."""
        return [self.first[number] - self.arrived[number] + 1 for number in numbers]


@pytest.fixture(scope="module")
def adapters(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [toys.make_adapter(llama_dir, folder / f"a{seed}", seed, r=4) for seed in range(12)]


@pytest.mark.parametrize("who", ["adapter", "base"])
def test_one_that_floods_does_not_hold_up_another(
    llama_dir: Path, llama: BaseModel, adapters: list[Path], who: str
) -> None:
    """The other's time to first token, with 200 of the first queued, against that with as many as its own."""
    worst = {}
    for flood in (20, 200):
        harness = Harness(llama_dir, llama, max_sequences=4)
        greedy, modest = (harness.place(f"d{i}", deltas_of(adapters[i])) for i in (0, 1))
        traffic = Traffic(harness)
        traffic.plan(0, greedy, flood)
        steady = [number for turn in range(20) for number in traffic.plan(4 * turn, None if who == "base" else modest)]
        traffic.run()
        waits = traffic.waits(steady)
        worst[flood] = max(waits)
        assert len(harness.finished) == flood + 20
    assert worst[200] <= 2 * worst[20]
    assert worst[200] <= 16, "eight tokens of a sequence that runs, and as many of its own before it"


def test_what_one_did_not_use_is_not_owed_to_it(llama_dir: Path, llama: BaseModel, adapters: list[Path]) -> None:
    """The base has been served for long when an adapter comes with a flood: both get their shares from then on."""
    harness = Harness(llama_dir, llama, max_sequences=2)
    ref = harness.place("d", deltas_of(adapters[0]))
    traffic = Traffic(harness)
    traffic.plan(0, None, 60)
    traffic.plan(200, ref, 60)
    later = [number for turn in range(10) for number in traffic.plan(204 + 8 * turn, None)]
    while traffic.harness.steps < 204:
        traffic.step()
    assert 0 < harness.engine.active - 60 < 15, "the base still has some of its own waiting"
    traffic.run()
    first_of_adapter = min(traffic.first[number] for number in range(60, 120))
    assert first_of_adapter <= 200 + 8
    turns = sorted((step, number) for number, step in traffic.first.items() if step >= 204)
    shares = [number in range(60, 120) for _, number in turns[:20]]
    assert 8 <= sum(shares) <= 12, "two who both wait begin equally often"
    assert later


def test_shares_are_of_tokens_not_of_requests(llama_dir: Path, llama: BaseModel, adapters: list[Path]) -> None:
    harness = Harness(llama_dir, llama, max_sequences=2)
    ref = harness.place("d", deltas_of(adapters[0]))
    traffic = Traffic(harness)
    long = traffic.plan(0, None, 40, max_tokens=41)  # 9 + 2 * 41 = 91 each
    short = traffic.plan(0, ref, 200, max_tokens=2)  # 9 + 2 * 2 = 13 each
    while harness.steps < 300:
        traffic.step()
    served = [
        sum(len(harness.tokens[number]) * 2 + 9 for number in numbers if number in traffic.first)
        for numbers in (long, short)
    ]
    assert served[0] == pytest.approx(served[1], abs=2 * 91), "as the paper bounds it: by what is under way"


def test_higher_priorities_begin_first_and_are_preempted_last(
    llama_dir: Path, llama: BaseModel, adapters: list[Path]
) -> None:
    harness = Harness(llama_dir, llama, max_sequences=1)
    ref = harness.place("d", deltas_of(adapters[0]))
    traffic = Traffic(harness)
    numbers = {
        priority: traffic.plan(1, adapter, 3, priority=priority, max_tokens=2)
        for priority, adapter in ((0, ref), (-100, None), (100, ref), (7, None))
    }
    traffic.plan(0, None, max_tokens=4)
    traffic.run()
    order = sorted(range(12), key=lambda number: traffic.first[number])
    assert order == [*numbers[100], *numbers[7], *numbers[0], *numbers[-100]]

    block = 16 * sum(shape.bytes_per_token(llama.dtype) for shape in llama.layer_shapes)
    tight = Harness(llama_dir, llama, kv_memory_bytes=6 * block)
    tight.add(1, PROMPT, max_tokens=60, priority=-1)
    tight.step()
    for number in (2, 3):
        tight.add(number, [*PROMPT, number], max_tokens=60, priority=1)
    tight.run()
    order = list(tight.finished)
    assert order == [2, 3, 1], "the one that came first gave way"
    assert tight.rows[2] == 9 + 59, "the first of the higher ones was never interrupted"
    assert all(len(tokens) == 60 for tokens in tight.tokens.values())


@pytest.mark.parametrize("rate", [1, 3])
def test_more_adapters_than_places_all_get_their_turn(
    llama_dir: Path, llama: BaseModel, adapters: list[Path], rate: int
) -> None:
    """Twelve adapters with two places, each with `rate` requests at any time for 600 steps: whoever is done asks again
    at once. They have 5 to 11 tokens, so that those of one adapter do not end together.

    What bounds a wait, by design:

    - Turns. An adapter is asked for in the order of the counters, and loads get room in the order in which they are
      asked for. So another one is loaded before mine only if it was asked for before my request came, or later with a
      counter that is not above mine. Each time it has been loaded its counter grows by `cheapest` at least. Mine grows
      meanwhile by what those of my requests that run have still to sample.
    - Time. At any time two loads wait at least, and the adapters in both places yield once the sequences that waited
      for them have begun, in the step after their load. Those have `longest` steps. So every `longest` steps two loads
      get room, and the first token comes in the step after the load.
    """
    places, longest, cheapest = 2, 11, 9 + 2 * 5
    size = bind(llama, "x", deltas_of(adapters[0])).device_bytes
    harness = Harness(llama_dir, llama, adapter_memory_bytes=places * size, max_sequences=8)
    prepared = {f"d{index}": bind(llama, f"d{index}", deltas_of(path)) for index, path in enumerate(adapters)}
    loader, traffic = StepLoader(harness, prepared), Traffic(harness)
    refs = [AdapterRef(digest=digest, path="", strategy="lora") for digest in prepared]
    who = {}
    for index in range(12 * rate):
        (number,) = traffic.plan(0, refs[index % 12], max_tokens=5 + index % 7)
        who[number] = index % 12
    while traffic.arrivals or harness.engine.active:
        loader.load()
        for output in traffic.step():
            if output.finish and harness.steps < 600:
                (number,) = traffic.plan(harness.steps, refs[who[output.id]], max_tokens=5 + len(who) % 7)
                who[number] = who[output.id]
        assert harness.steps < 2000
    for number, own in who.items():
        arrived, first = traffic.arrived[number], traffic.first[number]
        before = Counter(digest for step, digest in loader.loads if arrived <= step <= first and digest != f"d{own}")
        counters = traffic.counters[number]
        mine = counters[f"d{own}"] + 2 * longest * (rate - 1)
        for digest, count in before.items():
            assert count <= 1 + max(0, 1 + (mine - counters.get(digest, 0)) // cheapest), "its turn was not kept"
        rounds = -(-(before.total() + 1) // places)
        assert first - arrived <= rounds * longest, "places did not change hands"
    served = Counter(who.values())
    assert min(served.values()) >= 0.8 * max(served.values()), "the requests that ended cost the same on average"
    assert len(loader.loads) <= len(who), "no load was for nothing"
    names = {f"a{index}": path for index, path in enumerate(adapters)}
    reference = Reference(llama_dir, names)
    for number in sorted(who)[:: len(who) // 24]:
        prompt = [*PROMPT, 3 + number % 100]
        expected = reference.logits(prompt + harness.tokens[number], f"a{who[number]}")[len(prompt) - 1 : -1]
        assert harness.tokens[number] == expected.argmax(-1).tolist()


def test_a_step_costs_what_runs_not_what_waits(llama_dir: Path, llama: BaseModel) -> None:
    """1,000 wait: for the base, and for 500 adapters that never come."""
    harness = Harness(llama_dir, llama, max_sequences=4)
    for number in range(500):
        harness.add(number, PROMPT, max_tokens=40)
        harness.add(1000 + number, PROMPT, AdapterRef(digest=f"d{number}", path="", strategy="lora"))
    harness.step()
    touched: list[str] = []
    pool = harness.engine.adapters
    lease, report = pool.lease, pool.report
    pool.lease = lambda digest: (touched.append("lease"), lease(digest))[1]  # type: ignore[method-assign]
    pool.report = lambda digest: (touched.append("report"), report(digest))[1]  # type: ignore[method-assign]
    turn = AdapterQueue.turn.fget
    assert turn is not None
    try:
        AdapterQueue.turn = property(lambda client: (touched.append("turn"), turn(client))[1])  # type: ignore[method-assign]
        harness.load_requests.clear()
        for _ in range(40):
            harness.step()
    finally:
        AdapterQueue.turn = property(turn)  # type: ignore[method-assign]
    assert len(harness.finished) >= 4, "places became free on the way"
    assert len(touched) < 40 * 20
    assert len(harness.load_requests) == 40 * 4
    assert len({ref.digest for ref in harness.load_requests}) == 4, "those that come next, and no others"


def test_what_was_loaded_while_no_place_is_free_is_not_loaded_again(
    llama_dir: Path, llama: BaseModel, adapters: list[Path]
) -> None:
    harness = Harness(llama_dir, llama, max_sequences=2)
    ref = AdapterRef(digest="d0", path="", strategy="lora")
    harness.add(0, PROMPT, max_tokens=40)
    harness.step()
    harness.add(1, PROMPT, ref)
    harness.add(2, PROMPT, max_tokens=30)
    harness.step()
    assert harness.load_requests == [ref]
    harness.place("d0", deltas_of(adapters[0]))
    for _ in range(20):
        harness.step()
    assert len(harness.engine._scheduler.running) == 2
    assert harness.load_requests == [ref]
    harness.run()


def test_cancelled_ones_leave_wherever_they_wait(llama_dir: Path, llama: BaseModel) -> None:
    block = 16 * sum(shape.bytes_per_token(llama.dtype) for shape in llama.layer_shapes)
    harness = Harness(llama_dir, llama, kv_memory_bytes=4 * block)
    away = AdapterRef(digest="away", path="", strategy="lora")
    for number in range(4):
        harness.add(number, [*PROMPT, *PROMPT[:7], 3 + number], max_tokens=30)
        harness.add(10 + number, PROMPT, away, priority=number)
    while not harness.engine._admission._preempted:
        harness.step()
    preempted = harness.engine._admission._preempted[0].id
    for number in (preempted, 3, 11, 13, 10, 12):
        harness.engine.cancel(number)
    harness.run()
    assert set(harness.finished) == set(range(4)) - {preempted, 3}
    assert harness.engine.blocks.free_blocks == 4
    assert not harness.engine._admission._queue._all
    harness.load_requests.clear()
    harness.step()
    assert not harness.load_requests, "nobody waits for it any more"


def sequence(number: int, digest: str | None, priority: int = 0) -> Sequence:
    adapter = AdapterRef(digest=digest, path="", strategy="lora") if digest else None
    sampling = Sampling(max_tokens=1)
    return Sequence.of(Generate(id=number, prompt_ids=[1], sampling=sampling, adapter=adapter, priority=priority))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_first_is_the_one_with_the_smallest_counter(data: st.DataObject) -> None:
    queue, waiting, arrival = FairQueue(), [], 0
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["add", "add", "serve", "cancel", "away", "back"]))
        if action == "add":
            digest = data.draw(st.sampled_from(["a", "b", "c", "d"]))
            new = sequence(arrival, digest, data.draw(st.integers(-1, 1)))
            arrival += 1
            queue.add(new)
            waiting.append(new)
        elif action in ("serve", "cancel") and waiting:
            first = queue.ready.first()
            chosen = first.first if action == "serve" and first else data.draw(st.sampled_from(waiting))
            assert queue.remove(chosen)
            waiting.remove(chosen)
            if action == "serve":
                queue.charge(chosen, data.draw(st.integers(1, 9)))
            queue.ended(chosen)
        elif action == "away" and (client := queue.ready.first()):
            queue.set_unloaded(client)
        elif action == "back" and (client := queue.unloaded.first()):
            queue.set_ready(client)
        clients = queue._queues
        for turns in (queue.ready, queue.unloaded):
            here = [client for client in clients.values() if client in turns]
            first = turns.first()
            assert (first.turn if first else None) == min((client.turn for client in here), default=None)
            if first is not None:
                highest = max(other.priority for other in waiting if other.digest == first.digest)
                assert first.first.id == min(
                    other.id for other in waiting if other.digest == first.digest and other.priority == highest
                )
        assert len(queue.ready) + len(queue.unloaded) == len({other.digest for other in waiting})


def test_clients_are_forgotten_and_gain_nothing_by_it() -> None:
    queue = FairQueue()
    for number in range(5000):
        one = sequence(number, f"d{number}")
        queue.add(one)
        queue.remove(one)
        queue.charge(one, 10 if number % 100 else 10_000)
        queue.ended(one)
    assert len(queue._queues) < 2500
    slow, heavy = sequence(6000, "slow"), sequence(6001, "heavy")
    queue.add(slow)
    queue.add(heavy)
    queue.remove(heavy)
    queue.charge(heavy, 1000)
    counter = queue._queues["heavy"].counter
    for number in range(5000):
        one = sequence(number, f"d{number}")
        queue.add(one)
        queue.remove(one)
        queue.ended(one)
        if number == 1:
            queue.ended(heavy)
    assert queue._queues["heavy"].counter == counter, "it is ahead of the one that waits: that is not forgotten"
    turns: Turns[int] = Turns(lambda client: client.counter)
    client = AdapterQueue("x")
    for _ in range(1000):
        turns.put(client)
        turns.remove(client)
    assert len(turns._heap) < 200
