"""What is measured: the cases, and the requests of each, the same for every side."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PROMPT_TOKENS = 64
PROMPT = list(range(100, 100 + PROMPT_TOKENS))
"""Where every request may have the same prompt."""
NEW_TOKENS = 32
MIXED_RANKS = (8, 16, 64)
VOCABULARY = range(10, 4000)
"""Prompts are drawn from these token ids; every model here has them, and none is special."""


@dataclass(frozen=True)
class Case:
    """Requests of one kind. name: for --cases. title: in tables.

    at_once: requests that run at the same time; the next one is sent when one has ended. adapters: how many different
    ones; request i uses adapter i modulo that number. quick: also part of the short run.
    """

    name: str
    title: str
    at_once: int
    adapters: int
    ranks: tuple[int, ...] = (16,)
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS
    quick: bool = False

    @property
    def requests(self) -> int:
        """Every place and every adapter is used at least once."""
        return max(self.at_once, self.adapters)

    @property
    def adapter_names(self) -> list[str]:
        """Names of its adapters, such as r16-0: rank, then number. Cases share adapters of the same name."""
        return [f"r{self.ranks[index % len(self.ranks)]}-{index}" for index in range(self.adapters)]

    def job(self) -> dict[str, Any]:
        """The requests as every side gets them: token ids and adapter (None: the base) of each, and how long."""
        random_ids = random.Random(1)
        names: list[str] | list[None] = self.adapter_names or [None]
        return {
            "prompts": [random_ids.choices(VOCABULARY, k=self.prompt_tokens) for _ in range(self.requests)],
            "adapters": [names[index % len(names)] for index in range(self.requests)],
            "at_once": self.at_once,
            "new_tokens": self.new_tokens,
        }


def _batch(at_once: int, adapters: int, quick: bool = False) -> Case:
    what = "base only" if adapters == 0 else "1 adapter" if adapters == 1 else f"{adapters} adapters"
    return Case(f"{adapters or 'base'}-{at_once}", f"{what}, {at_once} requests", at_once, adapters, quick=quick)


CASES = (
    _batch(16, 0, quick=True),
    _batch(16, 1, quick=True),
    _batch(16, 4),
    _batch(16, 16, quick=True),
    Case("mixed-16", "16 adapters of rank 8, 16 and 64, 16 requests", 16, 16, MIXED_RANKS),
    Case("64-16", "64 adapters, 64 requests, 16 at once", 16, 64),
    _batch(32, 0),
    _batch(32, 1),
    _batch(32, 4),
    _batch(32, 16),
    Case("64-32", "64 adapters, 64 requests, 32 at once", 32, 64),
    Case("single", "one request, base", 1, 0, quick=True),
    Case("single-1", "one request, 1 adapter", 1, 1, quick=True),
    Case("prefill", "prompt of 1,024 tokens, base", 1, 0, prompt_tokens=1024, new_tokens=1, quick=True),
    Case("prefill-1", "prompt of 1,024 tokens, 1 adapter", 1, 1, prompt_tokens=1024, new_tokens=1),
)


def chosen(names: str, quick: bool) -> list[Case]:
    """The cases named in `names`, separated by commas; without names all, or those of the short run.

    Raises ValueError for a name that is no case.
    """
    if not names:
        return [case for case in CASES if case.quick or not quick]
    known = {case.name: case for case in CASES}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no case; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def adapters_of(cases: Iterable[Case]) -> list[str]:
    """Names of all adapters that the cases use."""
    return list(dict.fromkeys(name for case in cases for name in case.adapter_names))
