"""`make kill`: kill -9 of front, engine and tuner at random moments and failpoints, under load.

After each kill everything that was acknowledged must be there, whole; nothing half; nothing left behind. The kills and
what the clients do follow from the seed; when exactly a kill comes depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from benchmarks.common.machine import describe_machine
from tests import toys
from tests.e2e.rows import prompt_rows
from tests.e2e.serving import Server, eventually

from graftwork import Client, GraftworkError
from graftwork_server.hub.files.manifest import digest_of

TARGETS = ("front", "engine", "tuner")
FAILPOINTS = ("publish.announced", "publish.before_rename", "publish.after_rename", "publish.before_commit",
              "publish.after_commit")  # fmt: skip
JOB = {"max_steps": 200, "batch_size": 4, "checkpoint_steps": 20, "r": 4}
PROMPT = [1, 20, 45, 77]
MOST_ADAPTERS = 24
"""All files are read after each kill."""
KILL_SECONDS = 120.0
GIVEN_UP = ("ENGINE_LOST_REPEATEDLY", "TUNER_DIED")
"""Why a job fails that makes no progress from one kill to the next."""
POINT_SECONDS = 30.0
"""Longest wait for a failpoint or for a tuner."""
AFTER_SECONDS = 1.0


class Load:
    """Clients that create, pin and delete adapters and create jobs, and remember what the server acknowledged."""

    def __init__(self, folder: Path, model: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._adapters = [toys.make_adapter(model, folder / f"adapter-{n}", n) for n in range(3)]
        self.created = 0
        self._stop = threading.Event()
        self.published: dict[str, str] = {}
        """Adapters by id, with the digest that was acknowledged."""
        self.unsure: set[str] = set()
        """Adapters for which a call was broken off: both outcomes are right."""
        self.jobs: list[str] = []
        self.given_up: set[str] = set()
        """Jobs under which engine or tuner were killed too often."""

    def run(self, client: Client) -> None:
        """Goes on until stop() or the server's end."""
        rows = None
        while not self._stop.is_set():
            with contextlib.suppress(GraftworkError):
                rows = rows or client.datasets.upload(prompt_rows(16))
                self._act(client, rows)
                time.sleep(0.05)

    def stop(self) -> None:
        """Ends what run() does."""
        self._stop.set()

    def again(self) -> None:
        """run() may be called again."""
        self._stop.clear()

    def _act(self, client: Client, rows: Any) -> None:
        action = self._random.random()
        if not self.published or (action < 0.45 and len(self.published) < MOST_ADAPTERS):
            name, self.created = f"a{self.created}", self.created + 1
            self.unsure.add(name)
            self.published[name] = client.adapters.create(name, self._random.choice(self._adapters)).digest
            self.unsure.discard(name)
        elif action < 0.65:
            name = self._random.choice(sorted(self.published))
            self.unsure.add(name)
            client.adapters.delete(name)
            del self.published[name]
            self.unsure.discard(name)
        elif action < 0.8:
            client.adapters.pin(self._random.choice(sorted(self.published)))
        elif action < 0.9:
            client.generate(self._random.choice(sorted(self.published)), PROMPT, max_tokens=4, ignore_eos=True)
        elif not any(not client.tuning.get(job).done for job in self.jobs):
            job = client.tuning.create(strategy="lora", dataset=rows, adapter=f"job{len(self.jobs)}", config=JOB)
            self.jobs.append(job.id)


def check(server: Server, load: Load) -> list[str]:
    """What is wrong after a restart, in words."""
    wrong = []
    with server.client() as client:
        jobs = [client.tuning.get(job_id) for job_id in load.jobs]  # first: one may succeed while we look
        listed = {adapter.adapter_id: adapter for adapter in client.adapters.list()}
        for name, digest in load.published.items():
            found = listed.get(name)
            if found is None and name not in load.unsure:
                wrong.append(f"adapter {name} was acknowledged and is lost")
            elif found is not None and found.digest != digest:
                wrong.append(f"adapter {name} has other files than were acknowledged")
        for name, adapter in listed.items():
            if digest_of(server.artifact(adapter.digest)) != adapter.digest:
                wrong.append(f"the files of {name} are not whole")
            elif name in load.unsure or name.startswith("job"):
                client.generate(name, PROMPT, max_tokens=1, ignore_eos=True)
        for name in list(load.unsure):
            if name not in listed:
                load.published.pop(name, None)
            else:
                load.published[name] = listed[name].digest
            load.unsure.discard(name)
        for number, job in enumerate(jobs):
            if job.info.error_reason in GIVEN_UP:
                load.given_up.add(job.id)  # we killed under it three times in a row, and its record says so
            elif job.state in ("failed", "cancelled"):
                wrong.append(f"job {job.id} is {job.state}: {job.info.error}")
            if job.state == "succeeded":
                wrong += _check_job(job, f"job{number}", listed)
    return wrong


def _check_job(job: Any, adapter_id: str, listed: dict[str, Any]) -> list[str]:
    events = list(job.events(0, timeout=60))
    steps = list(range(1, JOB["max_steps"] + 1))
    checkpoints = list(range(JOB["checkpoint_steps"], JOB["max_steps"], JOB["checkpoint_steps"]))
    wrong = [] if adapter_id in listed else [f"job {job.id} succeeded, and its adapter is not there"]
    if [event.sequence for event in events] != list(range(1, len(events) + 1)):
        wrong.append(f"job {job.id}: the numbers of its events have holes")
    for what, found, wanted in (
        ("steps", [e.progress.step for e in events if e.progress], steps),
        ("checkpoints", [e.checkpoint_step for e in events if e.checkpoint_step is not None], checkpoints),
    ):
        if found != wanted:
            missing, more = sorted(set(wanted) - set(found)), len(found) - len(set(found))
            wrong.append(f"job {job.id}: {what} {missing} are not reported, {more} are twice or out of order")
    return wrong


class Servers:
    """One server at a time on one data directory, kept from one kill to the next where it survives."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._data, self._temporary = model, folder / "data", folder / "tmp"
        self._temporary.mkdir(parents=True)
        self._server: Server | None = None
        self._started: list[psutil.Process] = []
        """What ran below the server: nobody knows it once the server is dead."""
        self._read = 0

    def running(self, failpoint: str = "") -> Server:
        """The server; a new one if there is none, or if it is to have a failpoint."""
        if failpoint and self._server is not None:
            self._server.process.terminate()
            self._server.process.wait(KILL_SECONDS)
            self._server.close()
            self._server = None
        if self._server is None:
            variables = {"TMPDIR": str(self._temporary)} | ({"GRAFTWORK_FAILPOINT": failpoint} if failpoint else {})
            self._server = Server(self._model, self._data, **variables)
        return self._server

    def look(self) -> bool:
        """Notes what runs below the server now. Always true."""
        assert self._server is not None
        self._started = list(
            {process.pid: process for process in [*self._started, *self._server.descendants()]}.values()
        )
        return True

    def traceback(self) -> list[str]:
        """The traceback that came into the log since the last look, if one did."""
        assert self._server is not None
        with self._server.log.open("rb") as log:
            log.seek(self._read)
            text = log.read().decode(errors="replace")
            self._read = log.tell()
        _, found, rest = text.partition("Traceback")
        return [f"the log has a traceback: {found}{rest[:2000]}"] if found else []

    def end(self, how: str = "kill") -> list[str]:
        """Ends the front, by kill -9 or as an operator does, and returns what it left behind, in words."""
        server, self._server = self._server, None
        if server is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            self._started += server.descendants()
        getattr(server.process, how)()
        server.process.wait(KILL_SECONDS)
        _, alive = psutil.wait_procs(self._started, timeout=KILL_SECONDS)
        self._started = []
        server.close()
        left = [f"{process.name()} outlived the front" for process in alive]
        return left + [f"{name} is left in the temporary folder" for name in os.listdir(self._temporary)]


def one(load: Load, servers: Servers, target: str, point: str, delay: float) -> tuple[str, list[str]]:
    """A server under load until a kill, and a look at everything after it. Returns who was killed where, and what is
    wrong. A killed front is started again by us, an engine by the front, a tuner by the engine."""
    server = servers.running("" if point == "random" else point)
    wrong = []
    with server.client() as client:
        load.again()
        worker = threading.Thread(target=load.run, args=(client,), daemon=True)
        worker.start()
        if point != "random":
            with contextlib.suppress(AssertionError):  # nothing was published in this time
                eventually(lambda: servers.look() and server.process.poll() is not None, point, POINT_SECONDS)
            if server.process.poll() is None:
                point = "random"
        elif target == "tuner":
            with contextlib.suppress(AssertionError):  # no job was running in this time
                eventually(server.tuner, "a tuner", POINT_SECONDS)
        time.sleep(delay)
        if target == "front":
            wrong += servers.end()
        else:
            victim = server.tuner() if target == "tuner" else None
            if victim is None:
                target, victim = "engine", server.engine()
            if victim is None:
                target = "no engine, since none ran,"
            else:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
                psutil.wait_procs([victim], timeout=KILL_SECONDS)
            time.sleep(AFTER_SECONDS)  # calls fail, and others come, while it is gone
        load.stop()
        worker.join(KILL_SECONDS)
    server = servers.running()
    with server.client() as client:
        eventually(lambda: client.server.get().engine_ready, "the engine", KILL_SECONDS)
    return f"{target} at {point}", wrong + check(server, load) + servers.traceback()


def run(folder: Path, model: Path, load: Load, kills: int, seed: int) -> tuple[Counter[str], list[str]]:
    """So many kills on a data directory of its own: who was killed where, and what was wrong."""
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    violations: list[str] = []
    servers = Servers(model, folder)
    for number in range(1, kills + 1):
        target = TARGETS[number % len(TARGETS)]
        point = chance.choice(FAILPOINTS) if target == "front" and chance.random() < 0.5 else "random"
        killed, wrong = one(load, servers, target, point, chance.uniform(0, 8 if target == "tuner" else 3))
        counts[killed] += 1
        violations += [f"seed {seed}, kill {number} ({killed}): {what}" for what in wrong]
        print(f"seed {seed}, {number}/{kills} {killed}: {'; '.join(wrong) or 'nothing lost'}", flush=True)
    return counts, violations + [f"seed {seed}, at the end: {what}" for what in servers.end("terminate")]


def main() -> int:
    """Kills, checks, and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--servers", type=int, default=2, help="at once, each with a seed and a directory of its own")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="graftwork-kills-") as name:
        model = toys.make_text_model(Path(name, "model"))
        seeds = range(arguments.seed, arguments.seed + arguments.servers)
        folders = [Path(name, str(seed)) for seed in seeds]
        loads = [Load(folder, model, seed) for folder, seed in zip(folders, seeds, strict=True)]
        shares = [len(range(index, arguments.kills, arguments.servers)) for index in range(arguments.servers)]
        with ThreadPoolExecutor(arguments.servers) as pool:
            ended = list(pool.map(run, folders, [model] * arguments.servers, loads, shares, seeds))
    counts = sum((counts for counts, _ in ended), Counter[str]())
    violations = [what for _, found in ended for what in found]
    result = {
        "kills": sum(count for killed, count in counts.items() if not killed.startswith("no ")),
        "seeds": list(seeds),
        "seconds": round(time.monotonic() - started),
        "by_target_and_point": dict(sorted(counts.items())),
        "adapters_created": sum(load.created for load in loads),
        "jobs": sum(len(load.jobs) for load in loads),
        "jobs_given_up": sum(len(load.given_up) for load in loads),
        "violations": violations,
        "machine": describe_machine(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
