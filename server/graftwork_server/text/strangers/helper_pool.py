"""The helper processes of one purpose: how many, who is next, and who is refused.

What strangers' files compute waits here and nowhere else: callers wait as coroutines, and the threads that speak with
helpers are the pool's own. A key (an adapter, a client) holds as many helpers as its callers say, mostly one. A free
helper goes to the key that used least of their time lately. A key whose request went over a limit is marked for a
while: all that are marked share half of the helpers and can hardly queue, so the other half is there for all others.
Keys that are not known to be quick leave one helper to those that are, and take others first: files that loop, however
many and each for its first time, neither hold up those that work nor end the helper that has read them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from graftwork_server.errors import ResourceExhausted
from graftwork_server.text.strangers.helper import Helper, HelperStopped

QUEUE_PER_KEY = 64
QUEUE_PER_MARKED_KEY = 4
QUEUE = 512
MARK_SECONDS = 60.0
"""For the first time; twice as long each time, up to an hour."""
MOST_MARK_SECONDS = 3600.0
HALF_LIFE_SECONDS = 60.0
"""After which half of the time that a key used is forgotten."""
IDLE_SECONDS = 120.0
"""Helpers that nobody used for so long are ended."""
QUICK_SECONDS = 0.5
"""A key is known as quick as long as its requests end within this."""
RETRY_AFTER_MS = 1000
_MOST_HELPERS = 8

T = TypeVar("T")

log = logging.getLogger("graftwork.helpers")


def helper_count() -> int:
    """As many as cores, at most 8; at least 3: one for keys that are marked, one for new ones, one for quick ones."""
    return min(max(len(os.sched_getaffinity(0)), 3), _MOST_HELPERS)


@dataclass
class _Place:
    """A caller that waits for a helper."""

    number: int
    at_once: int
    slow: bool
    blame: bool
    tells: bool
    helper: asyncio.Future[Helper]
    begun: float = 0.0
    """When its helper was there and began with it."""
    may_hold: bool = False
    """What its key's may_hold said when it got a helper."""


@dataclass
class _Key:
    """What is known of a key."""

    waiting: deque[_Place] = field(default_factory=deque)
    running: int = 0
    used_seconds: float = 0.0
    used_at: float = 0.0
    marks: int = 0
    marked_until: float = 0.0
    is_quick: bool = False
    """The request that ended last took no longer than QUICK_SECONDS."""

    def used(self, now: float) -> float:
        """Seconds of helpers' time, those longer ago counting less."""
        return float(self.used_seconds * 0.5 ** ((now - self.used_at) / HALF_LIFE_SECONDS))

    def is_marked(self, now: float) -> bool:
        """Whether one of its requests went over a limit not long ago."""
        return now < self.marked_until

    def may_hold(self, place: _Place) -> bool:
        """Whether `place` may keep its helper for long: it is slow, or the key is not known to be quick."""
        return place.slow or not self.is_quick

    def is_over(self, now: float) -> bool:
        """Whether nothing is worth remembering any more."""
        return self.used(now) < 0.01 and now - self.marked_until > MOST_MARK_SECONDS * bool(self.marks)


class HelperPool:
    """Runs work with a helper each, bounded in number, time and waiting. To be used on one event loop.

    `what` it is for, in errors: "adapters' tokenizers and chat templates". `arguments`: of helper_main.
    """

    def __init__(self, what: str, arguments: Sequence[str], count: int = 0) -> None:
        self._what = what
        self.count = count or helper_count()
        self._idle = [Helper(arguments) for _ in range(self.count)]
        self._all = tuple(self._idle)
        self._threads = ThreadPoolExecutor(self.count, "helper")
        self._keys: dict[str, _Key] = {}
        self._active: dict[str, _Key] = {}
        """Those that wait or run."""
        self._numbers = self._holding = 0
        self._sweeping: asyncio.TimerHandle | None = None

    async def run(
        self,
        key: str,
        work: Callable[[Helper], T],
        *,
        seconds: float,
        at_once: int = 1,
        slow: bool = False,
        blame: bool = True,
        ends_with_caller: bool = False,
        tells: bool = True,
    ) -> T:
        """The result of `work`, which may ask its helper for `seconds` in all. `at_once`: helpers that `key` may hold.

        `slow`: it may take minutes, so one helper is left to what is not. `blame`: `key` is marked if this goes over a
        limit; not where many share a key, as those who come from one host do. `tells`: its end tells whether others of
        `key` are quick; reading files does not, if what is in them runs later. A caller that is cancelled does not wait
        for the end; the helper works on, unless it `ends_with_caller`.
        Raises ResourceExhausted (QUEUE_FULL), and HelperStopped if the helper gave no answer.
        """
        loop = asyncio.get_running_loop()
        entry = self._admit(key)
        self._numbers += 1
        place = _Place(self._numbers, at_once, slow, blame, tells, loop.create_future())
        entry.waiting.append(place)
        self._hand_out()
        try:
            helper = await place.helper
        except asyncio.CancelledError:
            if place in entry.waiting:
                entry.waiting.remove(place)
                self._forget_if_unused(key)
            elif not place.helper.cancelled():
                self._give_back(key, place, place.helper.result())
            raise
        begun = time.monotonic()
        running = loop.run_in_executor(self._threads, partial(_work_with, helper, key, place, work, seconds))
        running.add_done_callback(partial(self._ended, key, place, helper, begun))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if ends_with_caller:
                helper.kill()
            raise

    def close(self) -> None:
        """Ends the helpers. Blocking, for as long as it takes to end them."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for helper in self._all:
            helper.kill()
        self._threads.shutdown()
        for helper in self._all:
            helper.close()

    # ------------------------------------------------------------------------------------------ whose turn it is

    def _admit(self, key: str) -> _Key:
        now = time.monotonic()
        entry = self._keys.get(key) or _Key(used_at=now)
        most = QUEUE_PER_MARKED_KEY if entry.is_marked(now) else QUEUE_PER_KEY
        if len(entry.waiting) >= most or sum(len(other.waiting) for other in self._active.values()) >= QUEUE:
            raise self._full(entry)
        self._keys[key] = self._active[key] = entry
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._sweep)
        return entry

    def _full(self, entry: _Key) -> ResourceExhausted:
        why = ""
        if entry.is_marked(time.monotonic()):
            why = f"; not more may after {entry.marks} that took more time or memory than they may"
        return ResourceExhausted(
            f"{len(entry.waiting)} requests wait for {self._what} here already{why}",
            reason="QUEUE_FULL",
            metadata={"retry_after_ms": str(RETRY_AFTER_MS)},
        )

    def _hand_out(self) -> None:
        while self._idle and (key := self._next()) is not None:
            entry = self._keys[key]
            place = entry.waiting.popleft()
            if place.helper.cancelled():
                continue
            entry.running += 1
            place.may_hold = entry.may_hold(place)
            self._holding += place.may_hold
            helper = self._chosen(key, place)
            self._idle.remove(helper)
            place.helper.set_result(helper)

    def _chosen(self, key: str, place: _Place) -> Helper:
        """Of the free helpers the last for what may hold it, whoever has its files: it may end it. For others one that
        has read the key's files, else the first, so that those behind it may end when they are not needed."""
        free = [helper for helper in self._all if helper in self._idle]
        if place.may_hold:
            return free[-1]
        return next((helper for helper in free if key in helper.served), free[0])

    def _next(self) -> str | None:
        """The key that is next: of those that are not marked if there are any, the one that used least."""
        now = time.monotonic()
        marked_running = sum(entry.running for entry in self._active.values() if entry.is_marked(now))
        best: tuple[tuple[bool, float, int], str] | None = None
        for key, entry in self._active.items():
            if not entry.waiting or entry.running >= entry.waiting[0].at_once:
                continue
            if entry.may_hold(entry.waiting[0]) and self._holding >= self.count - 1:
                continue
            marked = entry.is_marked(now)
            if marked and marked_running >= self.count // 2:
                continue
            rank = (marked, entry.used(now), entry.waiting[0].number)
            if best is None or rank < best[0]:
                best = rank, key
        return None if best is None else best[1]

    def _ended(self, key: str, place: _Place, helper: Helper, begun: float, done: asyncio.Future[Any]) -> None:
        now = time.monotonic()
        entry = self._keys[key]
        entry.used_seconds, entry.used_at = entry.used(now) + now - begun, now
        error = None if done.cancelled() else done.exception()
        if place.tells:
            ended_well = not isinstance(error, HelperStopped)
            entry.is_quick = ended_well and now - place.begun <= QUICK_SECONDS
        if isinstance(error, HelperStopped) and error.why != "killed":
            log.warning("%s: a request was ended, it took too much %s", self._what, error.why)
            if place.blame:
                self._mark(entry, now)
        self._give_back(key, place, helper)

    def _mark(self, entry: _Key, now: float) -> None:
        entry.marks += 1
        entry.marked_until = now + min(MARK_SECONDS * 2 ** (entry.marks - 1), MOST_MARK_SECONDS)
        while len(entry.waiting) > QUEUE_PER_MARKED_KEY:
            last = entry.waiting.pop().helper
            if not last.cancelled():
                last.set_exception(self._full(entry))

    def _give_back(self, key: str, place: _Place, helper: Helper) -> None:
        entry = self._keys[key]
        entry.running -= 1
        self._holding -= place.may_hold
        self._idle.append(helper)
        self._hand_out()
        self._forget_if_unused(key)

    def _forget_if_unused(self, key: str) -> None:
        entry = self._keys[key]
        if not entry.waiting and not entry.running:
            self._active.pop(key, None)

    def _sweep(self) -> None:
        """Ends helpers, and forgets keys, that nobody used lately."""
        now = time.monotonic()
        self._sweeping = None
        for key in [key for key, entry in self._keys.items() if key not in self._active and entry.is_over(now)]:
            del self._keys[key]
        unused = [helper for helper in self._idle if helper.idle_seconds > IDLE_SECONDS]
        for helper in unused:
            self._idle.remove(helper)
            closed = asyncio.get_running_loop().run_in_executor(self._threads, helper.close)
            closed.add_done_callback(partial(self._swept, helper))
        if self._keys or len(unused) < sum(helper.started for helper in self._all):
            self._sweeping = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._sweep)

    def _swept(self, helper: Helper, done: asyncio.Future[None]) -> None:
        self._idle.append(helper)
        self._hand_out()


def _work_with(helper: Helper, key: str, place: _Place, work: Callable[[Helper], T], seconds: float) -> T:
    helper.limit(seconds)
    helper.served.add(key)  # now, as a process that was just started has served nobody
    place.begun = time.monotonic()
    return work(helper)
