"""The base model's files: a directory as it is, a hub id from the cache or, once, from the hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.e2e.serving import environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "graftwork-toys/llama"
CODE = """
import sys
from graftwork_server.base.files import model_dir
from graftwork_server.errors import FailedPrecondition
try:
    print(model_dir(sys.argv[1]))
except FailedPrecondition as error:
    print(error.reason, error.message)
"""
"""In a process of its own: the hub library reads its settings when it is imported."""

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode(),
    "model-1.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
}


class Hub(ThreadingHTTPServer):
    """A hub with one repository; `asked` has the paths of all requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[str] = []


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        status, body, headers = 404, b"", {"X-Error-Code": "RepoNotFound"}
        if path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in FILES.items()]
            status, body, headers = 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
            status, headers = 200, {"Content-Type": "application/json"}
        elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
            body = FILES[path.rpartition("/")[2]]
            status, headers = 200, {"ETag": hashlib.sha1(body).hexdigest(), "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    running = Hub()
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def found(source: str, cache: Path, **variables: str) -> str:
    """What model_dir says of `source`, on one line; nothing else may be printed."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, source],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(HF_HUB_CACHE=str(cache), **variables),
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    return done.stdout.strip()


def test_a_hub_id_is_fetched_once_and_then_served_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    folder = Path(found(REPOSITORY, tmp_path, **online))
    assert folder.name == COMMIT
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: data for name, data in FILES.items() if not name.endswith(".bin")
    }
    hub.asked.clear()
    assert found(REPOSITORY, tmp_path, **online) == str(folder)
    assert hub.asked == []
    assert found(REPOSITORY, tmp_path, HF_HUB_OFFLINE="1") == str(folder)
    (folder / "model-1.safetensors").unlink()  # a fetch that was broken off is not taken for a model
    assert found(REPOSITORY, tmp_path, HF_HUB_OFFLINE="1").startswith("MODEL_UNUSABLE")
    assert found(REPOSITORY, tmp_path, **online) == str(folder)


def test_an_id_that_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    answer = found("graftwork-toys/none", tmp_path, **online)
    assert answer.startswith("MODEL_UNUSABLE --model 'graftwork-toys/none': its files are not in the local cache, and ")
    assert hub.asked.count("/api/models/graftwork-toys/none") == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./none", "it is not a directory"),
        ("a/b/c", "it is not a directory"),
        ("empty", "it has no config.json"),
        ("bad id", "neither a directory nor in the form of an id"),
    ],
)
def test_what_can_be_no_model_is_said_without_asking_the_hub(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwork_server.base.files import model_dir
    from graftwork_server.errors import FailedPrecondition

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FailedPrecondition, match=f"^--model '{source}': .*{words}; accepted are a directory") as caught:
        model_dir(source)
    assert caught.value.reason == "MODEL_UNUSABLE"
