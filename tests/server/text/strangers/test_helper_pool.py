"""Whose turn it is for a helper, and who is refused. The helpers are stand-ins; test_isolated_text.py has real ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from graftwork_server.errors import ResourceExhausted
from graftwork_server.text.strangers import helper_pool
from graftwork_server.text.strangers.helper import HelperStopped
from graftwork_server.text.strangers.helper_pool import HelperPool


class StandIn:
    """A helper without a process."""

    idle_seconds = 0.0
    started = False

    def __init__(self, arguments: Any) -> None:
        self.served: set[str] = set()
        self.killed = threading.Event()

    def limit(self, seconds: float) -> None:
        pass

    def kill(self) -> None:
        self.killed.set()

    def close(self) -> None:
        pass


class Work:
    """Work that goes on when it is told to, and notes when it began."""

    def __init__(self, name: str, begun: list[str]) -> None:
        self._name, self._begun = name, begun
        self.may_end = threading.Event()
        self.stopped = threading.Event()
        self.error: Exception | None = None

    def __call__(self, helper: Any) -> str:
        self._begun.append(self._name)
        while not self.may_end.wait(0.01):
            if helper.killed.is_set():
                self.stopped.set()
                raise HelperStopped("killed")
        if self.error is not None:
            raise self.error
        return self._name


class Runs:
    """Starts work in a pool, and knows what has begun."""

    def __init__(self, pool: HelperPool) -> None:
        self._pool = pool
        self.helpers = pool._all
        self.begun: list[str] = []
        self.works: dict[str, Work] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}
        self._ended = 0

    async def start(self, key: str, name: str, **options: Any) -> None:
        work = self.works[name] = Work(name, self.begun)
        self.tasks[name] = asyncio.create_task(self._pool.run(key, work, seconds=60, **options))
        await self._settle()

    async def end(self, name: str, error: Exception | None = None) -> None:
        self.works[name].error = error
        self.works[name].may_end.set()
        await asyncio.wait([self.tasks[name]])
        self._ended += 1
        await self._settle()

    async def know(self, *keys: str) -> None:
        """Something of each ends well."""
        for key in keys:
            await self.start(key, f"{key}-first")
            await self.end(f"{key}-first")
        self.begun.clear()
        self._ended = 0

    async def go_away(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.wait([self.tasks[name]])

    async def _settle(self) -> None:
        """Waits until all that was given a helper has begun with it."""
        for _ in range(2000):
            await asyncio.sleep(0.005)
            if len(self.begun) == self._ended + self._pool.count - len(self._pool._idle):
                return
        raise AssertionError("waited in vain")


@pytest_asyncio.fixture
async def runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Runs]:
    """With two helpers, or as many as the test's parameter says."""
    monkeypatch.setattr(helper_pool, "Helper", StandIn)
    pool = HelperPool("things", [], count=getattr(request, "param", 2))
    made = Runs(pool)
    yield made
    for task in made.tasks.values():
        task.cancel()
    await asyncio.to_thread(pool.close)
    await asyncio.gather(*made.tasks.values(), return_exceptions=True)


async def test_a_key_has_one_helper_and_others_have_the_rest(runs: Runs) -> None:
    await runs.know("a", "b")
    for name in ("a1", "a2", "a3"):
        await runs.start("a", name)
    await runs.start("b", "b1")
    assert runs.begun == ["a1", "b1"]
    await runs.end("b1")
    assert runs.begun == ["a1", "b1"], "one of a's runs already"
    await runs.end("a1")
    assert runs.begun == ["a1", "b1", "a2"]
    assert await runs.tasks["a1"] == "a1"


async def test_who_used_least_is_next(runs: Runs) -> None:
    await runs.know("busy", "other", "third", "new")
    await runs.start("busy", "busy1")
    await runs.start("other", "other1")
    await asyncio.sleep(0.1)
    await runs.end("busy1")
    await runs.start("third", "third1")
    await runs.start("busy", "busy2")
    await runs.start("new", "new1")
    assert runs.begun == ["busy1", "other1", "third1"]
    await runs.end("third1")
    assert runs.begun[-1] == "new1", "it came later, and had nothing yet"


async def test_what_is_slow_leaves_a_helper(runs: Runs) -> None:
    await runs.know("a", "b", "c")
    for name in ("a1", "a2"):
        await runs.start("a", name, at_once=2, slow=True)
    await runs.start("b", "b1", slow=True)
    await runs.start("c", "c1")
    assert runs.begun == ["a1", "c1"]


async def test_keys_of_which_nothing_is_known_leave_a_helper(runs: Runs) -> None:
    """Three files that loop, each for its first time, and one that has worked before."""
    await runs.know("good")
    for key in ("a", "b", "c"):
        await runs.start(key, f"{key}1")
    await runs.start("good", "good1")
    assert runs.begun == ["a1", "good1"]
    await runs.end("a1", HelperStopped("time"))
    await runs.end("good1")
    await runs.start("good", "good2")
    assert runs.begun == ["a1", "good1", "b1", "good2"], "the second helper is left, not lent"


@pytest.mark.parametrize("runs", [3], indirect=True)
async def test_a_new_key_waits_for_none_that_is_marked(runs: Runs) -> None:
    await runs.start("bad", "bad1")
    await runs.end("bad1", HelperStopped("time"))
    for key in ("bad", "new", "newer"):
        await runs.start(key, f"{key}2")
    assert runs.begun == ["bad1", "bad2", "new2"]


async def test_what_may_hold_a_helper_takes_the_last(runs: Runs) -> None:
    await runs.know("good")
    good = next(helper for helper in runs.helpers if "good" in helper.served)
    assert good is runs.helpers[-1], "it was new"
    await runs.start("good", "good1")
    await runs.start("bad", "bad1")
    assert "bad" in runs.helpers[0].served, "the last is taken"
    await runs.end("good1")
    await runs.end("bad1", HelperStopped("time"))
    await runs.start("bad", "bad2")
    assert "bad" in runs.helpers[-1].served


async def test_a_queue_is_bounded_by_key_and_in_all(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper_pool, "QUEUE_PER_KEY", 2)
    monkeypatch.setattr(helper_pool, "QUEUE", 3)
    for number in range(4):
        await runs.start("a", f"a{number}")
    await runs.start("b", "b0")
    await runs.start("b", "b1")
    await runs.start("c", "c0")
    for name in ("a3", "c0"):
        with pytest.raises(ResourceExhausted, match="wait for things") as caught:
            await runs.tasks[name]
        assert (caught.value.reason, caught.value.metadata["retry_after_ms"]) == ("QUEUE_FULL", "1000")


@pytest.mark.parametrize("runs", [3], indirect=True)
async def test_who_went_over_a_limit_is_marked_unless_many_share_the_key(runs: Runs) -> None:
    for name in ("a", "b"):
        await runs.start(name, f"{name}1")
        await runs.end(f"{name}1", HelperStopped("time"))
    await runs.start("host", "host1", blame=False)
    await runs.end("host1", HelperStopped("memory"))
    await runs.start("killed", "killed1")
    await runs.end("killed1", HelperStopped("killed"))
    await runs.start("a", "a2")
    await runs.start("b", "b2")
    assert runs.begun[-1] == "a2", "both are marked, and share one of three helpers"
    await runs.start("host", "host2")
    assert runs.begun[-1] == "host2"
    await runs.start("killed", "killed2")
    await runs.end("a2")
    assert runs.begun[-1] == "killed2", "who is not marked comes first"


async def test_a_caller_that_goes_away_leaves_its_helper_at_work(runs: Runs) -> None:
    await runs.start("a", "a1")
    await runs.start("a", "a2")
    await runs.go_away("a2")
    await runs.go_away("a1")
    await runs.start("a", "a3")
    assert runs.begun == ["a1"], "one at a time, whoever waits"
    await runs.end("a1")
    assert runs.begun == ["a1", "a3"]


async def test_what_may_take_minutes_ends_with_its_caller(runs: Runs) -> None:
    await runs.start("a", "a1", ends_with_caller=True)
    await runs.go_away("a1")
    assert await asyncio.to_thread(runs.works["a1"].stopped.wait, 60)
