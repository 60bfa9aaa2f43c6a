"""What a tuning job learns with no settings at all, against the best of a grid of 12 settings.

    python -m benchmarks.defaults [--tasks queues orders past] [--strategies lora full] [--output FILE.json]

One real server with the model on board; small made-up tasks (benchmarks/workloads/tuning_tasks.py) of 100 rows each.
Per task and strategy one job with no settings and 12 with four learning rates and three numbers of epochs, one after
another; each version then answers 60 rows that no job saw, greedily; only the exact text counts. The aim is 0.9 of the
grid's best.
Where a job with no settings answers 0.9 of all rows, no settings can be further ahead: there the grid is tried with
--whole-grid only. With --output, what was measured before is kept, so a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import graftwork_server
from benchmarks.common.machine import describe_machine
from benchmarks.common.options import plain_parser, store
from benchmarks.common.server_process import ServerProcess, end_on_sigterm
from benchmarks.common.tables import markdown
from benchmarks.workloads.tuning_tasks import TASKS, Row, answer_of, make_rows
from graftwork import Client

MODEL_DIR = Path(graftwork_server.__file__).parent / "demo_model"
RATES = {"lora": (3e-4, 1e-3, 3e-3, 1e-2), "full": (3e-5, 1e-4, 3e-4, 1e-3)}
EPOCHS = (3, 8, 24)
TRAIN_ROWS, HELD_OUT_ROWS = 100, 60
LONGEST_ANSWER = 96
AT_ONCE = 16
WANTED = 0.9


def answer(client: Client, model: str, row: Row) -> str:
    """The greedy answer to a row, asked as a client would ask who taught such rows."""
    if "messages" in row:
        return client.chat(model, row["messages"][:-1], max_tokens=LONGEST_ANSWER).text
    if "prompt" in row:
        return client.generate(model, row["prompt"], max_tokens=LONGEST_ANSWER).text
    task = f"{row['instruction']}\n\n{row['input']}"
    return client.chat(model, [{"role": "user", "content": task}], max_tokens=LONGEST_ANSWER).text


def right_answers(client: Client, model: str, rows: list[Row]) -> int:
    """How many rows are answered exactly as they teach."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda row: answer(client, model, row), rows))
    return sum(given.strip() == answer_of(row).strip() for given, row in zip(answers, rows, strict=True))


def run_job(client: Client, task: str, strategy: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One job from its creation to its answers."""
    train, held_out = make_rows(task, TRAIN_ROWS, HELD_OUT_ROWS)
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in train))
    dataset = client.datasets.upload(file)
    started = time.monotonic()
    job = client.tuning.create(
        strategy=strategy, dataset=dataset, adapter=f"{task}-{strategy}", config=config, new_version=True
    )
    result = job.wait()
    seconds = time.monotonic() - started
    progress = job.info.progress
    assert progress is not None  # a job that has succeeded has made steps
    return {
        "task": task,
        "strategy": strategy,
        "config": config,
        "right": right_answers(client, f"{task}-{strategy}", held_out),
        "steps": progress.step,
        "published_step": result.published_step,
        "seconds": round(seconds, 1),
        "chosen": {choice.key: choice.value for choice in job.info.choices if choice.automatic},
    }


def grid(strategy: str) -> list[dict[str, Any]]:
    """Twelve settings."""
    pairs = itertools.product(RATES[strategy], EPOCHS)
    return [{"learning_rate": rate, "num_epochs": epochs} for rate, epochs in pairs]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All jobs that `arguments.output` does not have yet."""
    measured: dict[str, Any] = {"benchmark": "defaults", "jobs": []}
    if arguments.output and arguments.output.exists():
        measured = json.loads(arguments.output.read_text())
    done = {json.dumps([job["task"], job["strategy"], job["config"]]) for job in measured["jobs"]}
    measured |= {"machine": describe_machine(), "threads": arguments.threads, "held_out_rows": HELD_OUT_ROWS}
    with tempfile.TemporaryDirectory(prefix="graftwork-bench-") as folder:
        options = ["--data-dir", f"{folder}/data", "--threads", str(arguments.threads), "--log-level", "warning"]
        with ServerProcess([*options, "--dtype", arguments.dtype]) as server, Client(address=server.address) as client:
            measured["dtype"] = server.dtype
            pairs = list(itertools.product(arguments.tasks, arguments.strategies))
            wanted: list[tuple[str, str, dict[str, Any]]] = [(*pair, {}) for pair in pairs]
            wanted += [(task, strategy, config) for task, strategy in pairs for config in grid(strategy)]
            for task, strategy, config in wanted:
                if json.dumps([task, strategy, config]) in done:
                    continue
                if config and not arguments.whole_grid and no_settings(measured, task, strategy) >= WANTED:
                    continue
                job = run_job(client, task, strategy, config, Path(folder))
                measured["jobs"].append(job)
                store(measured, arguments.output)
                print(f"{task} {strategy} {config or 'no settings'}: {job['right']} right", flush=True)
    return measured


def no_settings(measured: dict[str, Any], task: str, strategy: str) -> float:
    """Share of all rows that the job without settings answers."""
    jobs = [job for job in measured["jobs"] if (job["task"], job["strategy"], job["config"]) == (task, strategy, {})]
    return float(jobs[0]["right"] / measured["held_out_rows"])


def table(measured: dict[str, Any]) -> str:
    """A line for each task and strategy: right answers with no settings and of the grid's best."""
    head = ["task", "strategy", "no settings", "best of the grid", "its settings", "ratio", "steps", "seconds"]
    rows, jobs = [], measured["jobs"]
    for task, strategy in dict.fromkeys((job["task"], job["strategy"]) for job in jobs):
        mine = [job for job in jobs if (job["task"], job["strategy"]) == (task, strategy)]
        tried = [job for job in mine if job["config"]]
        default = next((job for job in mine if not job["config"]), None)
        if default is None:
            continue
        most, settings = measured["held_out_rows"], "not tried: none can have more right"
        if tried:
            best = max(tried, key=lambda job: job["right"])
            most = best["right"]
            settings = f"{best['config']['learning_rate']:g}, {best['config']['num_epochs']} epochs; {len(tried)} tried"
        ratio = default["right"] / max(1, most)
        rows.append(
            [
                f"{TASKS[task].kind} ({task})",
                strategy,
                f"{default['right']} of {measured['held_out_rows']}",
                f"{most}",
                settings,
                f"{ratio:.2f}{'' if ratio >= WANTED else ' (too low)'}",
                f"{default['steps']}, of step {default['published_step']}",
                f"{default['seconds']:.0f}",
            ]
        )
    return markdown(head, rows)


def main() -> None:
    """Measures, prints and stores."""
    end_on_sigterm()
    parser = plain_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["queues", "orders", "past"])
    parser.add_argument("--strategies", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--whole-grid", action="store_true", help="also where no setting can be further ahead")
    print(f"\n{table(measure(parser.parse_args()))}")


if __name__ == "__main__":
    main()
