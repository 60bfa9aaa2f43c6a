"""Hostile tokenizers and templates against a whole server: its memory, its processes, and the streams of others."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest
from tests import hostile, toys
from tests.e2e.serving import Server, eventually
from tests.e2e.test_bad_input import upload_raw

from graftwork import APIError, Client, UnavailableError

MEBIBYTE = 1 << 20
PROMPT = [1, 5, 9]
MESSAGES = [{"role": "user", "content": "the fox"}]


@pytest.fixture
def own(model_dir: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own."""
    running = Server(model_dir, tmp_path / "data")
    yield running
    running.close()


@pytest.fixture(scope="module")
def adapter(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An adapter's own files: configuration and weights."""
    folder = toys.make_adapter(model_dir, tmp_path_factory.mktemp("adapter"))
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.startswith("adapter_")}


def helpers(server: Server) -> list[psutil.Process]:
    """Helper processes of a server."""
    found = []
    for child in server.descendants():
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "graftwork_server.helper_main" in child.cmdline():
                found.append(child)
    return found


def test_bombs_leave_the_front_small_and_a_stream_as_it_was(
    server: Server, client: Client, model_dir: Path, adapter: dict[str, bytes]
) -> None:
    expected = client.generate("base", PROMPT, max_tokens=100, ignore_eos=True).token_ids
    front = psutil.Process(server.process.pid)
    before = front.memory_info().rss
    document = json.loads((model_dir / "tokenizer.json").read_text())
    written = server.log.stat().st_size
    bombs = [json.dumps(make(document)).encode() for make in hostile.TOKENIZERS.values()]
    bombs = [bomb for bomb in bombs if len(bomb) < MEBIBYTE]  # which one message may carry
    refused: list[str] = []

    def send() -> None:
        for bomb in bombs:
            with pytest.raises(grpc.RpcError) as caught:
                upload_raw(server, adapter | {"tokenizer.json": bomb}, "bomb")
            refused.append(caught.value.code().name)

    sender = threading.Thread(target=send)
    sender.start()
    while sender.is_alive():
        assert client.generate("base", PROMPT, max_tokens=100, ignore_eos=True).token_ids == expected
        assert front.memory_info().rss - before < 96 * MEBIBYTE
    sender.join()
    assert refused == ["FAILED_PRECONDITION"] * len(bombs)
    assert b"Traceback" not in server.log.read_bytes()[written:]


def test_a_killed_helper_is_replaced_and_a_killed_front_leaves_none(own: Server, adapter: dict[str, bytes]) -> None:
    upload_raw(own, adapter | {"chat_template.jinja": hostile.LOOPING.encode()}, "looping")
    upload_raw(own, adapter | {"chat_template.jinja": hostile.HARMLESS.encode()}, "harmless")
    with own.client() as client:
        expected = client.chat("harmless", MESSAGES, max_tokens=3).token_ids
        errors: list[APIError] = []

        def loop() -> None:
            with suppress(grpc.RpcError), pytest.raises(APIError) as caught:
                client.chat("looping", MESSAGES, max_tokens=1)
            errors.append(caught.value)

        looping = threading.Thread(target=loop)
        looping.start()
        while looping.is_alive():  # whenever it gets a helper: it is killed
            for helper in helpers(own):
                with suppress(psutil.NoSuchProcess):
                    helper.send_signal(signal.SIGKILL)
            looping.join(0.3)
        assert isinstance(errors[0], UnavailableError)
        assert errors[0].reason == "HELPER_DIED"
        assert client.chat("harmless", MESSAGES, max_tokens=3).token_ids == expected
        again = threading.Thread(target=loop)
        again.start()
        started = eventually(lambda: helpers(own), "helpers")
        own.process.kill()
        again.join()
    gone, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []
    assert len(gone) == len(started)
