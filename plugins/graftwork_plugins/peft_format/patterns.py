"""Regular expressions of clients, matched as PEFT matches them, where they can hurt nobody.

`re` knows no limit of time and keeps the interpreter while it matches, so all but plain names are matched by a process
of its own (pattern_process.py), with limits of time and memory, that ends with its PatternMatcher.
"""

from __future__ import annotations

import json
import re
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graftwork_plugins import ArtifactError

_PROCESS = Path(__file__).with_name("pattern_process.py")
MAX_NAMES = 4096
"""Names or patterns in one list of a client: each is compared with each module of the base."""
_PLAIN = re.compile(r"[A-Za-z0-9_.-]*")
"""Nothing in these is repeated, so that they need no `re`, which would spend 0.1 ms on each to compile it."""
_MAX_CHARACTERS = 4096
_MAX_IN_ALL = 1 << 20
_SECONDS = 20.0
"""For the answers to all questions of one matcher; the process itself has 2 seconds of processor time."""


class PatternError(ArtifactError):
    """A name pattern cannot be used; it is the key."""


class PatternMatcher:
    """Regular expressions of one client's document, with one limit of time for all matches made by this object."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answered: dict[tuple[tuple[str, ...], str, bool], str | None] = {}
        self._deadline = 0.0

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether all of `name` matches. Raises PatternError."""
        return self._first([pattern], name, endings=False) is not None

    def first_match(self, patterns: Iterable[str], name: str) -> str | None:
        """The first pattern that matches `name` or its last dotted parts, as PEFT's rank_pattern does. Raises
        PatternError."""
        return self._first(list(patterns), name, endings=True)

    def _first(self, keys: list[str], name: str, *, endings: bool) -> str | None:
        if len(keys) > MAX_NAMES:
            raise PatternError(keys[0], f"there are {len(keys)} patterns; at most {MAX_NAMES} are accepted")
        for key in keys:
            if len(key) > _MAX_CHARACTERS:
                raise PatternError(key[:80], f"the pattern {key[:80]!r}... is over {_MAX_CHARACTERS} characters")
        if sum(map(len, keys)) > _MAX_IN_ALL:
            raise PatternError(keys[0], f"the patterns have over {_MAX_IN_ALL} characters together")
        if all(_PLAIN.fullmatch(key) for key in keys):
            return next((key for key in keys if _matches_plainly(key, name, endings=endings)), None)
        question = tuple(keys), name, endings
        if question not in self._answered:
            self._answered[question] = self._ask(keys, name, endings=endings)
        return self._answered[question]

    def _ask(self, keys: list[str], name: str, *, endings: bool) -> str | None:
        if self._process is None:
            self._process = _start()
            self._deadline = time.monotonic() + _SECONDS
            weakref.finalize(self, _end, self._process)
        patterns = [rf"(.*\.)?({key})" for key in keys] if endings else keys
        answer = _answer(self._process, {"patterns": patterns, "name": name}, self._deadline)
        if answer is None:
            which = f"the pattern {keys[0]!r} takes" if len(keys) == 1 else "the patterns take"
            raise PatternError(keys[0], f"{which} too long to match; use a plainer one")
        match answer:
            case {"error": error, "index": index}:
                raise PatternError(keys[index], f"{keys[index]!r} is no regular expression that can be used: {error}")
            case {"index": int(index)}:
                return keys[index]
        return None


def _matches_plainly(key: str, name: str, *, endings: bool) -> bool:
    """What `re` says of a plain key, whose dots stand for any character but a line end."""
    begin = len(name) - len(key)
    if begin and not (endings and begin > 0 and name[begin - 1] == "." and "\n" not in name[:begin]):
        return False
    return all(k == n or (k == "." and n != "\n") for k, n in zip(key, name[begin:], strict=True))


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-W", "ignore", str(_PROCESS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
    )


def _answer(process: subprocess.Popen[bytes], question: dict[str, Any], deadline: float) -> dict[str, Any] | None:
    """The process's answer, None if it has ended over it, or did not answer in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(max(0.0, deadline - time.monotonic())):
            return None
    line = process.stdout.readline()
    answer: dict[str, Any] | None = json.loads(line) if line else None
    return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
