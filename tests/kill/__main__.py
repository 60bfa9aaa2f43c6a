"""`make kill`: kill -9 of front, engine and tuner at random moments and failpoints, under load, on one data directory.

After each kill everything that was acknowledged must be there, whole; nothing half; nothing left behind. The kills and
what the clients do follow from the seed; when exactly a kill comes depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from tests import toys
from tests.e2e.rows import prompt_rows
from tests.e2e.serving import Server, eventually

from graftwork import Client, GraftworkError, __version__
from graftwork_server.hub.store import digest_of

TARGETS = ("front", "engine", "tuner")
FAILPOINTS = ("publish.announced", "publish.before_rename", "publish.after_rename", "publish.before_commit",
              "publish.after_commit")  # fmt: skip
JOB = {"max_steps": 12, "batch_size": 4, "checkpoint_steps": 2, "r": 4}
PROMPT = [1, 20, 45, 77]
KILL_SECONDS = 120.0


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

    def run(self, client: Client) -> None:
        """Goes on until stop() or the server's end."""
        rows = None
        while not self._stop.is_set():
            with contextlib.suppress(GraftworkError):
                rows = rows or client.datasets.upload(prompt_rows(16))
                self._act(client, rows)
                time.sleep(0.05)

    def stop(self) -> None:
        self._stop.set()

    def again(self) -> None:
        self._stop.clear()

    def _act(self, client: Client, rows: Any) -> None:
        action = self._random.random()
        if action < 0.45 or not self.published:
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
        for number, job_id in enumerate(load.jobs):
            job = client.tuning.get(job_id)
            if job.state in ("failed", "cancelled"):
                wrong.append(f"job {job_id} is {job.state}: {job.info.error}")
            if job.state == "succeeded":
                wrong += _check_job(job, f"job{number}", listed)
    return wrong


def _check_job(job: Any, adapter_id: str, listed: dict[str, Any]) -> list[str]:
    events = list(job.events(0, timeout=60))
    expected = list(range(1, JOB["max_steps"] + 1))
    wrong = [] if adapter_id in listed else [f"job {job.id} succeeded, and its adapter is not there"]
    if [event.sequence for event in events] != list(range(1, len(events) + 1)):
        wrong.append(f"job {job.id}: the numbers of its events have holes")
    for what, found, wanted in (
        ("steps", [e.progress.step for e in events if e.progress], expected),
        ("checkpoints", [e.checkpoint_step for e in events if e.checkpoint_step is not None], expected[1:-1:2]),
    ):
        if found != wanted:
            wrong.append(f"job {job.id}: {what} reported are {found}")
    return wrong


def kill(server: Server, target: str, started: list[psutil.Process]) -> None:
    """Ends one process, and waits until it is gone, and with the front all that it has started."""
    if target == "front":
        started += server.descendants()
        server.process.kill()
        server.process.wait()
        return
    victim = server.engine() if target == "engine" else server.tuner()
    if victim is not None:
        victim.kill()
        psutil.wait_procs([victim], timeout=KILL_SECONDS)


def one(load: Load, model: Path, data: Path, target: str, point: str, delay: float) -> list[str]:
    """A server's life until a kill, and the one after it. Returns what is wrong."""
    variables = {"TMPDIR": str(data.parent / "tmp")} | ({"GRAFTWORK_FAILPOINT": point} if point != "random" else {})
    server = Server(model, data, **variables)
    started: list[psutil.Process] = []
    load.again()
    with server.client() as client:
        worker = threading.Thread(target=load.run, args=(client,), daemon=True)
        worker.start()
        if point != "random":
            with contextlib.suppress(AssertionError):  # nothing was published in this time
                eventually(lambda: server.process.poll() is not None or not _note(server, started), point, 30)
        time.sleep(delay)
        if target != "front":
            kill(server, target, started)
            time.sleep(1)
        load.stop()
        kill(server, "front", started)
        worker.join(KILL_SECONDS)
    _, alive = psutil.wait_procs(started, timeout=KILL_SECONDS)
    wrong = [f"{process.name()} outlived the front" for process in alive]
    server.close()
    after = Server(model, data, TMPDIR=str(data.parent / "tmp"))
    try:
        wrong += check(after, load)
        if "Traceback" in after.log.read_text(errors="replace"):
            wrong.append("there is a traceback in the log")
    finally:
        started = after.descendants()
        after.close()
        psutil.wait_procs(started, timeout=KILL_SECONDS)
    left = os.listdir(data.parent / "tmp")
    return wrong + [f"{name} is left in the temporary folder" for name in left]


def _note(server: Server, started: list[psutil.Process]) -> bool:
    """Notes what runs below the server, since nobody knows it once the server is dead."""
    started[:] = {process.pid: process for process in [*started, *server.descendants()]}.values()
    return True


def main() -> int:
    """Kills, checks, and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    violations: list[str] = []
    with tempfile.TemporaryDirectory(prefix="graftwork-kills-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        model = toys.make_text_model(folder / "model")
        load = Load(folder, model, arguments.seed)
        for number in range(arguments.kills):
            target = TARGETS[number % len(TARGETS)]
            point = chance.choice(FAILPOINTS) if target == "front" and chance.random() < 0.5 else "random"
            wrong = one(load, model, folder / "data", target, point, chance.uniform(0, 4))
            counts[f"{target} at {point}"] += 1
            violations += [f"kill {number + 1} ({target} at {point}): {what}" for what in wrong]
            print(
                f"{number + 1}/{arguments.kills} {target} at {point}: {'; '.join(wrong) or 'nothing lost'}", flush=True
            )
    result = {
        "kills": arguments.kills,
        "seed": arguments.seed,
        "by_target_and_point": dict(sorted(counts.items())),
        "adapters_acknowledged": load.created,
        "jobs": len(load.jobs),
        "violations": violations,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"graftwork": __version__, "python": platform.python_version()},
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
