"""A client that is gone, or has no more time, ends its sequence: the only place there is goes to the next request.

Each abandoned stream has a million tokens left, so that nobody after it would be served if it went on.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests import toys
from tests.e2e.serving import Server, environment, eventually

from graftwork import Client, DeadlineExceededError

ENDLESS = {"max_tokens": 990_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs one sequence at a time, with the adapter `one`."""
    folder = tmp_path_factory.mktemp("narrow")
    running = Server(model_dir, folder / "data", "--max-sequences", "1")
    with running.client() as client:
        client.adapters.create("one", toys.make_adapter(model_dir, folder / "adapter"))
    yield running
    running.close()


@pytest.fixture
def one_place(narrow: Server) -> Iterator[Client]:
    """A client; when the test is over, the place must be free again."""
    with narrow.client() as client:
        yield client
        assert client.generate("base", [1, 2, 3], max_tokens=2, ignore_eos=True).usage.completion_tokens == 2


@pytest.mark.parametrize("model", ["base", "one"])
def test_a_closed_stream_ends_its_sequence(one_place: Client, model: str) -> None:
    with one_place.generate(model, [1, 2, 3], stream=True, **ENDLESS) as stream:
        next(stream)


def test_a_deadline_ends_its_sequence(one_place: Client) -> None:
    stream = one_place.generate("one", [1, 2, 3], stream=True, timeout=5, **ENDLESS)
    next(stream)
    with pytest.raises(DeadlineExceededError):
        list(stream)


def test_a_killed_client_ends_its_sequence(narrow: Server, one_place: Client) -> None:
    script = (
        "import graftwork, sys\n"
        "stream = graftwork.Client().generate('one', [1, 2, 3], stream=True, max_tokens=990_000, ignore_eos=True)\n"
        "for chunk in stream: print(len(chunk.token_ids), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment(GRAFTWORK_ADDRESS=narrow.address)
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdigit()
    process.kill()
    process.communicate()


def test_a_waiting_request_that_is_given_up_never_runs(one_place: Client) -> None:
    with one_place.generate("base", [1, 2, 3], stream=True, **ENDLESS) as stream:
        next(stream)
        with pytest.raises(DeadlineExceededError):
            one_place.generate("one", [1, 2, 3], timeout=1, **ENDLESS)
        next(stream)


def test_an_abandoned_stream_gives_up_its_adapter(one_place: Client) -> None:
    """Its lease must have ended with the stream, or the adapter could not be unloaded."""
    with one_place.generate("one", [1, 2, 3], stream=True, **ENDLESS) as stream:
        next(stream)
    assert one_place.generate("one", [1, 2, 3], max_tokens=1).model == "one"
    assert one_place.adapters.unload("one").loaded is False


def test_a_waiting_request_finds_its_adapter_loaded(one_place: Client) -> None:
    """It is loaded while the only place is taken, not once the place is free."""
    one_place.adapters.unload("one")
    with ThreadPoolExecutor(1) as threads:
        with one_place.generate("base", [1, 2, 3], stream=True, **ENDLESS) as stream:
            next(stream)
            waiting = threads.submit(one_place.generate, "one", [1, 2, 3], max_tokens=1)
            eventually(lambda: one_place.adapters.get("one").loaded, "the adapter to be loaded ahead of time")
            next(stream)
            assert not waiting.done()
        assert waiting.result(60).model == "one"
