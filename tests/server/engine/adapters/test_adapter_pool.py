"""The pool when adapters are more than it holds: turns, pins, loads ahead of time, what the host cache gives back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests import toys
from tests.e2e.serving import eventually
from tests.server.engine.harness import Harness, deltas_of

from graftwork_plugins import LowRank
from graftwork_server.engine.adapters.host_cache import HostCache
from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.engine.adapters.pool import AdapterPool
from graftwork_server.errors import FailedPrecondition, ResourceExhausted
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.binding.prepared import PreparedAdapter
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.slots import SLOTS_PER_BLOCK, SlotBlock

STOP = threading.Event()


@pytest.fixture(scope="module")
def deltas(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LowRank]:
    return deltas_of(toys.make_adapter(llama_dir, tmp_path_factory.mktemp("adapter") / "a", 0, r=4))


@pytest.fixture
def prepare(llama: BaseModel, deltas: list[LowRank]) -> Callable[..., PreparedAdapter]:
    """An adapter by digest, of rank 4, or with a fourth of the bytes."""

    def made(digest: str, part: int = 1) -> PreparedAdapter:
        own = [LowRank(module=d.module, a=d.a[: 4 // part], b=d.b[:, : 4 // part], scaling=d.scaling) for d in deltas]
        return bind(llama, digest, own)

    return made


@pytest.fixture
def pool_of(llama_dir: Path, llama: BaseModel, prepare: Callable[..., PreparedAdapter]) -> Callable[..., AdapterPool]:
    """A pool with room for so many adapters of rank 4, and a host cache for so many more."""
    size = prepare("x").device_bytes

    def made(places: float, kept: int = 0) -> AdapterPool:
        limits = {"adapter_memory_bytes": int(places * size), "host_cache_bytes": kept * size}
        return Harness(llama_dir, llama, **limits).engine.adapters

    return made


def idle(pool: AdapterPool, prepared: PreparedAdapter) -> LoadedAdapter:
    adapter = pool.place(prepared, 0.0, STOP)
    pool.release(adapter)
    return adapter


def held(pool: AdapterPool, prepared: PreparedAdapter) -> LoadedAdapter:
    """Placed, leased by a sequence, and its load is over."""
    adapter = pool.place(prepared, 0.0, STOP)
    assert pool.lease(adapter.digest) is adapter
    pool.release(adapter)
    return adapter


def content(adapter: LoadedAdapter) -> torch.Tensor:
    assert adapter.block is not None
    return adapter.block.read(adapter.slot)


class Waiting:
    """Loads that run in threads of their own, begun one after another."""

    def __init__(self, pool: AdapterPool) -> None:
        self.pool = pool
        self.threads = ThreadPoolExecutor(8)

    def place(self, prepared: PreparedAdapter) -> Future[LoadedAdapter]:
        before = len(self.pool._waiting)
        placed = self.threads.submit(self.pool.place, prepared, 0.0, STOP)
        eventually(lambda: placed.done() or len(self.pool._waiting) > before, "the load to be placed or to wait", 30)
        return placed


def test_a_load_that_waits_makes_the_least_recently_used_yield(pool_of, prepare) -> None:
    pool = pool_of(2)
    a, b = (held(pool, prepare(digest)) for digest in "ab")
    waiting = Waiting(pool)
    c = waiting.place(prepare("c"))
    eventually(lambda: pool.report("a") is None, "the oldest to yield", 30)
    assert pool.lease("a") is None, "nobody new gets in front of the load that waits"
    second = pool.lease("b")
    assert second is b, "the others go on"
    a_again = waiting.place(prepare("a"))
    assert not c.done()
    pool.release(a)
    assert c.result(30).digest == "c"
    assert not a_again.done(), "it queues up behind"
    eventually(lambda: pool.report("b") is None, "the next one to yield", 30)
    pool.release(b)
    assert not a_again.done()
    pool.release(second)
    assert a_again.result(30).digest == "a"
    assert pool.digests() == ["c", "a"]
    assert pool.used_bytes == pool.budget_bytes


def test_whoever_waited_for_a_load_gets_a_lease_before_it_yields_again(pool_of, prepare) -> None:
    pool = pool_of(1)
    adapter, waiting = held(pool, prepare("a")), Waiting(pool)
    turns = [waiting.place(prepare(digest)) for digest in "bacd"]
    for turn, digest in zip(turns, "bacd", strict=True):
        eventually(lambda name=adapter.digest: pool.report(name) is None, "the one on the device to yield", 30)
        pool.release(adapter)
        adapter = turn.result(30)
        assert adapter.digest == digest
        time.sleep(0.25)  # those who wait have looked at it
        assert pool.lease(digest) is adapter, "it was loaded for somebody"
        pool.release(adapter)  # the load's own


def test_one_that_yields_for_nothing_is_leased_again(pool_of, prepare) -> None:
    pool = pool_of(2)
    held(pool, prepare("a"))
    b = held(pool, prepare("b"))
    c = Waiting(pool).place(prepare("c"))
    eventually(lambda: pool.report("a") is None, "the oldest to yield", 30)
    pool.release(b)
    assert c.result(30).digest == "c"
    assert pool.lease("a") is not None


def test_one_that_yielded_for_nothing_is_not_waited_for(pool_of, prepare) -> None:
    """The load that it yielded for got other room; its own next load need not wait for any."""
    pool = pool_of(2)
    a, b = (held(pool, prepare(digest)) for digest in "ab")
    waiting = Waiting(pool)
    c = waiting.place(prepare("c"))
    eventually(lambda: pool.report("a") is None, "the oldest to yield", 30)
    again = waiting.place(prepare("a"))
    pool.release(b)
    assert c.result(30).digest == "c"
    assert again.result(30) is a
    assert pool.lease("a") is a
    assert not pool._waiting


def test_a_load_waits_for_a_pinned_adapter_that_is_being_unloaded(pool_of, prepare) -> None:
    pool = pool_of(1)
    pool.pin(["a"])
    a = held(pool, prepare("a"))
    assert pool.unload("a")
    b = Waiting(pool).place(prepare("b"))
    assert not b.done()
    pool.release(a)
    assert b.result(30).digest == "b"


def test_small_loads_pass_a_waiting_one_only_where_it_does_not_need_the_room(pool_of, prepare) -> None:
    pool = pool_of(2.25)
    a, b = (held(pool, prepare(digest)) for digest in "ab")
    waiting = Waiting(pool)
    large = waiting.place(prepare("large"))
    assert waiting.place(prepare("small", 4)).result(30).digest == "small", "a quarter is left over"
    second = waiting.place(prepare("second", 4))
    assert not second.done(), "what is left now is the large one's"
    pool.release(a)
    assert large.result(30).digest == "large"
    pool.release(b)
    assert second.result(30).digest == "second"


def test_pinned_adapters_are_never_evicted(pool_of, prepare) -> None:
    pool = pool_of(2)
    pool.pin(["a"])
    idle(pool, prepare("a"))
    for digest in "bcd":
        idle(pool, prepare(digest))
        assert pool.digests() == ["a", digest]
    pool.pin(["a", "d"])
    with pytest.raises(ResourceExhausted, match="unpin one") as raised:
        pool.place(prepare("e"), 0.0, STOP)
    assert raised.value.reason == "ADAPTERS_PINNED"
    waiting = Waiting(pool)
    pool.pin(["d"])
    assert waiting.place(prepare("e")).result(30).digest == "e"
    assert pool.digests() == ["d", "e"]
    assert pool.unload("d"), "unloading is asked for by name"


def test_a_load_ahead_of_time_takes_room_of_nobody(pool_of, prepare) -> None:
    pool = pool_of(2)
    a = pool.place(prepare("a"), 0.0, STOP)
    idle(pool, prepare("b"))
    pool.wanted = {"b"}
    assert pool.place_now(prepare("c"), 0.0) is None, "sequences wait for b"
    assert pool.digests() == ["a", "b"]
    pool.wanted = {"c"}
    placed = pool.place_now(prepare("c"), 0.0)
    assert placed is not None
    assert pool.digests() == ["a", "c"]
    assert pool.place_now(prepare("c"), 0.0) is placed, "loaded meanwhile"
    assert (a.leases, placed.leases) == (1, 2)


def test_what_is_evicted_comes_back_from_the_host_as_it_was(pool_of, prepare) -> None:
    pool = pool_of(1, kept=2)
    before = content(idle(pool, prepare("a")))
    idle(pool, prepare("b"))
    assert pool.host_cache.digests() == ["a"]
    kept = pool.host_cache.take("a")
    assert kept is not None
    assert (kept.modules_bound, kept.rank, kept.updates) == (21, 4, ())
    back = idle(pool, kept)
    assert torch.equal(content(back), before)
    assert back.report.modules_bound == 21
    assert pool.host_cache.digests() == ["b"], "each is in one place only"
    pool.unload("b")
    pool.unload("a")
    assert (pool.host_cache.used_bytes, pool.used_bytes) == (0, 0)


def test_the_host_cache_keeps_the_last_ones_that_fit(prepare) -> None:
    size = prepare("x").device_bytes
    cache = HostCache(2 * size)
    for digest in "abc":
        cache.put(prepare(digest))
    assert cache.digests() == ["b", "c"]
    assert cache.take("a") is None
    cache.put(prepare("b"))
    cache.put(prepare("d", 4))
    assert (cache.digests(), cache.used_bytes) == (["b", "d"], size + size // 4)
    HostCache(size - 1).put(prepare("a"))
    assert cache.take("b") is not None
    cache.discard("d")
    cache.discard("d")
    assert cache.used_bytes == 0


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e38])
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("native", [True, False])
def test_values_that_are_not_finite_leave_nothing_behind(
    llama: BaseModel, deltas: list[LowRank], pool_of, side: str, value: float, native: bool
) -> None:
    """1e38 is finite, but not when it is scaled."""
    pool = pool_of(2)
    if not native:
        pool.slots.kernels = None
    changed = {"a": deltas[2].a.clone(), "b": deltas[2].b.clone()}
    changed[side][1, 1] = value
    damaged = LowRank(module=deltas[2].module, scaling=8.0, **changed)
    prepared = bind(llama, "bad", [*deltas[:2], damaged, *deltas[3:]])
    if side == "a" and value == 1e38:
        idle(pool, prepared)
        return
    with pytest.raises(FailedPrecondition, match=f"{damaged.module}: {side.upper()} holds") as raised:
        pool.place(prepared, 0.0, STOP)
    assert raised.value.violations[0].field == damaged.module
    assert (pool.used_bytes, pool.digests(), dict(pool.slots.blocks)) == (0, [], {})


@pytest.mark.parametrize("what", ["read", "write", "new block"])
def test_a_copy_that_fails_takes_no_room(pool_of, prepare, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Memory that the host or the device does not have, when one is evicted or when the other comes."""
    pool = pool_of(1, kept=1)
    a = idle(pool, prepare("a"))
    size = a.bytes

    def fails(*args: object) -> None:
        raise MemoryError("no memory left")

    with monkeypatch.context() as patched:
        if what == "new block":
            patched.setattr("graftwork_server.engine.adapters.slot_blocks.SlotBlock", fails)
            pool.slots.spare = None
            prepared = prepare("b", 2)
        else:
            patched.setattr(SlotBlock, what, fails)
            prepared = prepare("b")
        if what == "read":
            assert idle(pool, prepared).digest == "b", "only the host's copy of the other one is lost"
        else:
            with pytest.raises(MemoryError):
                pool.place(prepared, 0.0, STOP)
    assert pool.used_bytes == (size if what == "read" else 0)
    assert idle(pool, prepare("c")).digest == "c"
    assert (pool.used_bytes, pool.digests()) == (size, ["c"])
    assert sum(SLOTS_PER_BLOCK - len(block.free) for blocks in pool.slots.blocks.values() for block in blocks) == 1
