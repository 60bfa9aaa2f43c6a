"""Everything once, in a few minutes on two cores: serve, hot-load, tune with two strategies, compare.

    python examples/dates/demo.py

Starts a server on a free port of this machine, uses it through graftwork.Client only, and ends it. What it makes is in
.demo/, the numbers in .demo/results.json. The exit code is not 0 if a tuned adapter has not learned the task, or if the
base could do it all along.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Nothing is to be looked up on the network: the model is on board.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from demo_peft import MODEL_DIR, greedy_tokens, save_random_adapter
from demo_report import Row, broken_bounds, megabytes, show_table, write_results
from demo_server import DemoError, DemoServer
from demo_speed import NEW_TOKENS, PROMPT_TOKENS, REQUESTS, median, tokens_per_second
from demo_tuning import follow
from make_data import make_splits
from score import exact_match

import graftwork

DEMO_DIR = Path(__file__).resolve().parents[2] / ".demo"

ANSWER_TOKENS = 16
"""A date in ISO 8601 has 11 tokens, and the end of the sequence is one."""
SIDE_BY_SIDE = 8
"""Adapters in the batch when the tokens per second are measured."""


class Demo:
    """The demo's steps, in order; each prints what it does."""

    def __init__(self, server: DemoServer, client: graftwork.Client, quick: bool) -> None:
        self._server, self._client, self._quick = server, client, quick
        self._heldout: list[dict[str, str]] = []
        self.rows: list[Row] = []
        self.rates: dict[str, list[float]] = {}
        self.settings: dict[str, dict[str, Any]] = {}

    def make_data(self) -> None:
        """Three files of made-up rows."""
        say("The task: turn a written date into ISO 8601 (made-up rows, no day in two files)")
        splits = make_splits(seed=7, train=2000, validation=100, heldout=100)
        for name, rows in splits.items():
            path = DEMO_DIR / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._heldout = splits["heldout"]
        for row in self._heldout[:3]:
            print(f"    {row['prompt']!r} -> {row['completion']!r}")

    def ask_base(self) -> None:
        """What the base model can do: English, but not the task."""
        say("The base model on board: it writes English of a kind, and it has never seen the task")
        prompt = "The first step is to"
        text = self._client.generate("base", prompt, max_tokens=32).text
        print(f"    base: {prompt}{text}".replace("\n", " "))
        score, seconds = self._score("base")
        model_bytes = sum(file.stat().st_size for file in MODEL_DIR.iterdir() if file.is_file())
        self.rows.append(Row("base", score, 0, None, self._server.memory_bytes(), model_bytes, None))
        print(f"    base: {score:.0%} of {len(self._heldout)} held-out rows exactly right ({seconds:.0f} s)")

    def hot_load(self) -> list[str]:
        """Adapters that plain PEFT wrote, loaded beside the base. Returns their ids. Raises DemoError."""
        say("An adapter from plain PEFT, uploaded and hot-loaded while the server runs")
        adapters = [f"peft-{number}" for number in range(1, SIDE_BY_SIDE + 1)]
        for seed, adapter_id in enumerate(adapters):
            save_random_adapter(DEMO_DIR / adapter_id, seed)
            self._client.adapters.create(adapter_id, DEMO_DIR / adapter_id)
            report = self._client.adapters.load(adapter_id).load_report
            assert report is not None  # load always reports
            if seed == 0:
                print(
                    f"    {adapter_id}: rank {report.rank} on {report.modules_bound} layers in {report.load_ms:.0f} ms"
                )
        prompt = self._client.tokenize("The first step is to").token_ids
        answer = self._client.generate(adapters[0], prompt, max_tokens=ANSWER_TOKENS, ignore_eos=True)
        print(f"    {answer.model}: The first step is to{answer.text}".replace("\n", " "))
        print("    (its weights are random, so its words are no better; the point is that the name picks the weights)")
        if "float32" in self._server.greeting:  # in other types, rounding may decide between two tokens
            if list(answer.token_ids) != greedy_tokens(DEMO_DIR / adapters[0], list(prompt), ANSWER_TOKENS):
                raise DemoError(f"{adapters[0]} does not answer as PEFT itself does")
            print(f"    the same {ANSWER_TOKENS} tokens come out of PEFT's own forward")
        print(f"    {', '.join(adapters[1:])}: made and loaded alike, for the measurement at the end")
        return adapters

    def tune(self, strategy: str, words: str) -> None:
        """One tuning job, then its adapter against the held-out rows."""
        adapter_id, config = f"dates-{strategy}", {"max_steps": 8} if self._quick else {}
        say(f"A tuning job: {words}")
        started = time.monotonic()
        train, validation = (
            self._client.datasets.upload(DEMO_DIR / f"{name}.jsonl") for name in ("train", "validation")
        )
        job = self._client.tuning.create(
            strategy=strategy, dataset=train, validation=validation, adapter=adapter_id, config=config
        )
        print(f"    strategy {strategy}, settings {json.dumps(config)}; the server chose the others:")
        for choice in job.info.choices:
            if choice.automatic:
                print(f"    {choice.key} = {choice.value}: {choice.reason}")
        self.settings[strategy] = {choice.key: choice.value for choice in job.info.choices}
        result = follow(job)
        minutes = (time.monotonic() - started) / 60
        report = self._client.adapters.load(adapter_id).load_report
        assert report is not None  # load always reports
        score, seconds = self._score(adapter_id)
        print(
            f"    {adapter_id}: published as version 1 ({megabytes(result.artifact_bytes)}), "
            f"hot-loaded in {report.load_ms:.0f} ms"
        )
        for row in self._heldout[:3]:
            answer = self._client.generate(adapter_id, row["prompt"], max_tokens=ANSWER_TOKENS)
            print(f"    {adapter_id}: {row['prompt']!r} -> {answer.text!r}")
        print(f"    {adapter_id}: {score:.0%} of {len(self._heldout)} held-out rows exactly right ({seconds:.0f} s)")
        self.rows.append(
            Row(
                strategy,
                score,
                result.trained_parameters,
                minutes,
                result.peak_memory_bytes,
                result.artifact_bytes,
                report.load_ms,
            )
        )

    def measure(self, adapters: list[str]) -> None:
        """Tokens per second with one and with many adapters in the batch."""
        say(f"Throughput: {REQUESTS} requests at once, {PROMPT_TOKENS} prompt tokens and {NEW_TOKENS} new ones each")
        self.rates = tokens_per_second(self._client, adapters)
        for case, rate in median(self.rates).items():
            print(f"    {case.replace('_', ' ')} in the batch: {rate:.0f} tokens/s")

    def _score(self, model: str) -> tuple[float, float]:
        """Exact match of greedy completions, all asked for at once, and the seconds it took."""

        def ask(row: dict[str, str]) -> str:
            return self._client.generate(model, row["prompt"], max_tokens=ANSWER_TOKENS).text

        started = time.monotonic()
        with ThreadPoolExecutor(len(self._heldout)) as pool:
            predictions = list(pool.map(ask, self._heldout))
        score = exact_match(predictions, [row["completion"] for row in self._heldout])
        return score, time.monotonic() - started


def run(quick: bool) -> int:
    """The whole demo; returns the exit code. Raises DemoError and GraftworkError."""
    started = time.monotonic()
    shutil.rmtree(DEMO_DIR, ignore_errors=True)
    DEMO_DIR.mkdir()
    server = DemoServer(DEMO_DIR / "server", DEMO_DIR / "server.log")
    say("A server with the base model on board")
    print(f"    $ {' '.join(server.command)}", flush=True)
    with server, graftwork.Client(address=server.address, timeout=300) as client:
        print(f"    {server.greeting}")
        demo = Demo(server, client, quick)
        demo.make_data()
        demo.ask_base()
        adapters = demo.hot_load()
        demo.tune("lora", "the data file becomes an adapter, trained on the weights that are being served")
        demo.tune("full", "the same data with every weight trained, in a copy of its own")
        demo.measure(adapters)
    seconds = time.monotonic() - started
    print()
    show_table(demo.rows, heldout=100)
    speeds = [f"{rate:.0f} with {case.replace('_', ' ')}" for case, rate in median(demo.rates).items()]
    print(f"tokens per second: {', '.join(speeds)} in the batch ({REQUESTS} requests at once)")
    write_results(
        DEMO_DIR / "results.json",
        demo.rows,
        quick=quick,
        wall_seconds=round(seconds, 1),
        settings=demo.settings,
        tokens_per_second=median(demo.rates),
        tokens_per_second_of_rounds=demo.rates,
        server=server.greeting,
    )
    print(f"{seconds / 60:.1f} minutes in all; the numbers are in {DEMO_DIR.name}/results.json")
    if quick:
        print("This was --quick: eight steps teach nothing, and no bound was checked.")
        return 0
    broken = broken_bounds(demo.rows)
    for sentence in broken:
        print(f"demo: {sentence}", file=sys.stderr)
    return 1 if broken else 0


def say(heading: str) -> None:
    """A heading."""
    print(f"\n{heading}", flush=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="eight steps a job: shows that it runs, not that it learns"
    )
    quick = parser.parse_args().quick
    # As Ctrl-C does, so that the server is ended then too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    if quick:
        print("--quick: eight steps a job; it shows that everything runs, not that anything is learned.")
    try:
        return run(quick)
    except (DemoError, graftwork.GraftworkError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the server has been ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
