"""Clients that cost others as much as they can (tests/hostile.py), each kind beside ordinary ones of the same size.

    python -m benchmarks.workloads.hostile ADDRESS FOLDER CLIENTS

They run in this process of their own: beside the client that is measured, they would hold its interpreter's lock.
FOLDER is what `make_files` made. A line of JSON on stdin such as {"kind": "grammars", "hostile": true} lets CLIENTS
clients send without pause, until {} ends them: its answer says how many requests were answered, and how many refused.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.line_worker import Job, Measured, answer_lines
from benchmarks.workloads.cases import PROMPT
from tests import hostile

from graftwork import Client, GraftworkError

CHAT = [{"role": "user", "content": "hello there"}]
OTHERS_TOKENS = 8
"""At most as many for each request of the others; most hostile ones end before."""
DATA_BYTES = 370_000
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
PATTERN = r".*\.(q_proj|nothing)"
TOKENIZERS: dict[str, Callable[[hostile.Document], hostile.Document]] = {
    "plain": dict,
    "other token": lambda document: hostile.with_first_added(document, lstrip=True),
}
HOSTILE_TOKENIZERS: dict[str, Callable[[hostile.Document], hostile.Document]] = {
    **{name: hostile.TOKENIZERS[name] for name in ("a post-processor's bomb", "a larger bomb")},
    "a prefix that merges lack": hostile.prefix_that_merges_lack,
    "a long first token": lambda document: hostile.with_first_added(document, content="a" * 100_000),
}

Attack = Callable[[Client, int], None]
"""Sends one request, which may be refused; the number is new each time, so that no answer is remembered."""


class Refused(Exception):
    """What was sent is not valid, says the answer."""


@dataclass(frozen=True)
class Kind:
    """Two clients' ways: `hostile` must cost others less than twice what `ordinary` does."""

    ordinary: Attack
    hostile: Attack


def make_files(adapter: Path, tokenizer: Path, folder: Path, clients: int) -> list[Path]:
    """The adapters that are sent, in folders under `folder`, each made from `adapter`, which the server takes.

    Returns those that must be on the server, under their folders' names, before clients of the kind "templates" come.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    document = json.loads(tokenizer.read_text())
    for name, change in (TOKENIZERS | HOSTILE_TOKENIZERS).items():
        adapter_with(adapter, folder / name, "tokenizer.json", json.dumps(change(document)))
    for name, pattern in (hostile.PATTERNS | {"pattern": PATTERN}).items():
        changed = json.dumps(config | {"target_modules": pattern})
        adapter_with(adapter, folder / name, "adapter_config.json", changed)
    wanted = []
    for index in range(clients):
        loop = hostile.LOOPS[index % len(hostile.LOOPS)]
        wanted.append(adapter_with(adapter, folder / f"looping-{index}", "chat_template.jinja", loop))
        wanted.append(adapter_with(adapter, folder / f"chatting-{index}", "chat_template.jinja", TEMPLATE + " "))
    return wanted


def adapter_with(adapter: Path, folder: Path, file: str, text: str) -> Path:
    """`folder` with `adapter`'s files, of which one has other content."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    (folder / file).write_text(text)
    return folder


def kinds(folder: Path, clients: int) -> dict[str, Kind]:
    """Every kind by name, for so many clients; `folder` is as make_files left it."""

    def upload(names: dict[str, Any]) -> Attack:
        return _upload([folder / name for name in names])

    return {
        "grammars": Kind(_generate(ordinary_grammar), _generate(hostile.costly_grammar)),
        "templates": Kind(_chat("chatting", clients), _chat("looping", clients)),
        "tokenizers": Kind(upload(TOKENIZERS), upload(HOSTILE_TOKENIZERS)),
        "patterns": Kind(_upload([folder / "pattern"]), upload(hostile.PATTERNS)),
        "data checks": Kind(_validate(ordinary_rows), _validate(lambda n: hostile.costly_rows(n, DATA_BYTES - 100))),
    }


def ordinary_grammar(number: int) -> dict[str, Any]:
    """A JSON schema of thirty required properties, all new."""
    properties = {f"field_{number}_{index}": {"enum": ["a", "b", str(index)]} for index in range(30)}
    return {"json_schema": {"type": "object", "properties": properties, "required": list(properties)}}


def ordinary_rows(number: int) -> bytes:
    """DATA_BYTES of rows as people have them."""
    row = {"prompt": f"What is the capital of country {number}?", "completion": "A town of some size, by a river."}
    line = json.dumps(row).encode() + b"\n"
    return line * (DATA_BYTES // len(line))


def _generate(grammar: Callable[[int], dict[str, Any]]) -> Attack:
    def send(client: Client, number: int) -> None:
        client.generate("base", PROMPT, max_tokens=OTHERS_TOKENS, **grammar(number))

    return send


def _chat(name: str, adapters: int) -> Attack:
    def send(client: Client, number: int) -> None:
        client.chat(f"{name}-{number % adapters}", CHAT, max_tokens=OTHERS_TOKENS)

    return send


def _upload(folders: list[Path]) -> Attack:
    def send(client: Client, number: int) -> None:
        client.adapters.create(f"upload-{number}", folders[number % len(folders)])
        try:
            client.tokenize("hello there", model=f"upload-{number}")
        finally:
            client.adapters.delete(f"upload-{number}")

    return send


def _validate(rows: Callable[[int], bytes]) -> Attack:
    def send(client: Client, number: int) -> None:
        if not client.datasets.validate(rows(number)).valid:
            raise Refused

    return send


class Clients:
    """So many clients of `address`, each on a thread of its own, that send one request after another."""

    def __init__(self, address: str, folder: Path, count: int) -> None:
        self._address, self._count = address, count
        self._kinds = kinds(folder, count)
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(count)
        self._running: list[Future[Counter[str]]] = []
        self._done = threading.Event()

    def measure(self, job: Job) -> Measured:
        """Starts the clients of a kind, or ends those that run. Raises what is no refusal."""
        if job:
            kind = self._kinds[job["kind"]]
            self._done.clear()
            attack = kind.hostile if job["hostile"] else kind.ordinary
            self._running = [self._threads.submit(self._send, attack) for _ in range(self._count)]
            time.sleep(0.5)
            return {}
        self.stop()
        counts = sum((client.result() for client in self._running), Counter[str]())
        return {"answered": counts["answered"], "refused": counts["refused"]}

    def stop(self) -> None:
        """No client sends again."""
        self._done.set()

    def _send(self, attack: Attack) -> Counter[str]:
        counts: Counter[str] = Counter()
        with Client(address=self._address, max_retries=0) as client:
            while not self._done.is_set():
                try:
                    attack(client, next(self._numbers))
                    counts["answered"] += 1
                except (GraftworkError, Refused):
                    counts["refused"] += 1
        return counts


def main() -> None:
    """Starts and ends clients as stdin says."""
    address, folder, count = sys.argv[1:]
    clients = Clients(address, Path(folder), int(count))
    try:
        answer_lines(clients.measure, ["graftwork"])
    finally:
        clients.stop()


if __name__ == "__main__":
    main()
