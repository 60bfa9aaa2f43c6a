"""Tokens per second of the running server, with one adapter in the batch and with several."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import graftwork

REQUESTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 16, 64, 48, 3


def tokens_per_second(client: graftwork.Client, adapters: Sequence[str]) -> dict[str, list[float]]:
    """New tokens per second, prompts included in the time, by what the requests in flight were for; one number a round.

    Each round has REQUESTS requests at once: all for the first adapter, then spread evenly over all adapters. A round
    of each is not counted. Raises APIError.
    """
    spread = [adapters[number % len(adapters)] for number in range(REQUESTS)]
    cases = {"1_adapter": [adapters[0]] * REQUESTS, f"{len(adapters)}_adapters": spread}
    made: dict[str, list[float]] = {case: [] for case in cases}
    rng = random.Random(0)
    with ThreadPoolExecutor(REQUESTS) as pool:
        for number in range(ROUNDS + 1):
            for case, models in cases.items():
                prompts = [[rng.randrange(300, 4096) for _ in range(PROMPT_TOKENS)] for _ in models]
                rate = _one_round(client, pool, models, prompts)
                if number:
                    made[case].append(rate)
    return made


def median(rates: dict[str, list[float]]) -> dict[str, float]:
    """The median of each case's rounds."""
    return {case: statistics.median(values) for case, values in rates.items()}


def _one_round(
    client: graftwork.Client, pool: ThreadPoolExecutor, models: list[str], prompts: list[list[int]]
) -> float:
    def ask(model: str, prompt: list[int]) -> int:
        answer = client.generate(model, prompt, max_tokens=NEW_TOKENS, ignore_eos=True)
        return answer.usage.completion_tokens

    started = time.perf_counter()
    tokens = sum(pool.map(ask, models, prompts))
    return tokens / (time.perf_counter() - started)
