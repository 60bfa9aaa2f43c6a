"""Pinned adapters are on the device before anybody asks: after a restart of the server, and of its engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import toys
from tests.e2e.serving import Server, eventually, run_cli

from graftwork import APIError, NotFoundError


def test_pins_outlive_server_and_engine(model_dir: Path, tmp_path: Path) -> None:
    directories = [toys.make_adapter(model_dir, tmp_path / str(seed), seed) for seed in range(2)]
    first = Server(model_dir, tmp_path / "data")
    try:
        with first.client() as client:
            client.adapters.create("kept", directories[0])
            client.adapters.create("other", directories[1], load=True)
            shown = run_cli("adapter", "pin", "kept", address=first.address)
            assert (shown.returncode, shown.stderr) == (0, "")
            assert shown.stdout.startswith("pinned kept@1\n")
            adapter = client.adapters.get("kept")
            assert (adapter.pinned, adapter.loaded) == (True, True)
            assert not client.adapters.get("other").pinned
    finally:
        first.close()
    second = Server(model_dir, tmp_path / "data")
    try:
        with second.client() as client:
            eventually(lambda: client.adapters.get("kept").loaded, "the pinned adapter to be loaded")
            assert not client.adapters.get("other").loaded
            engine = second.engine()
            assert engine is not None
            engine.kill()
            eventually(lambda: not client.adapters.get("kept").loaded, "the engine's end to be noticed")
            eventually(lambda: client.adapters.get("kept").loaded, "the new engine to load it again")
            unloaded = client.adapters.unload("kept")
            assert (unloaded.pinned, unloaded.unpinned) == (False, True), "unloading ends the pin and says so"
            assert run_cli("adapter", "unpin", "kept", address=second.address).stdout == "unpinned kept@1\n"
            assert not client.adapters.get("kept").loaded
    finally:
        second.close()


def test_pins_that_fill_the_pool_are_refused_by_name(model_dir: Path, tmp_path: Path) -> None:
    directories = [toys.make_adapter(model_dir, tmp_path / str(seed), seed) for seed in range(2)]
    size = 4 * 8 * 3 * 704  # float32, rank 8, three layers
    server = Server(model_dir, tmp_path / "data", "--adapter-memory-bytes", str(size + size // 2))
    try:
        with server.client() as client:
            for name, directory in zip(("one", "two"), directories, strict=True):
                client.adapters.create(name, directory)
            report = client.adapters.pin("one").load_report
            assert report is not None
            assert (report.modules_bound, report.rank, report.device_bytes) == (21, 8, size)
            for refused in (client.adapters.pin, client.adapters.load):
                with pytest.raises(APIError) as caught:
                    refused("two")
                assert caught.value.reason == "ADAPTERS_PINNED"
            assert not client.adapters.get("two").pinned
            assert client.generate("one", [1, 2, 3], max_tokens=2, ignore_eos=True).model == "one"
            client.adapters.unpin("one")
            assert client.generate("two", [1, 2, 3], max_tokens=2, ignore_eos=True).model == "two"
            client.adapters.pin("two")
            client.adapters.delete("two")
            with pytest.raises(NotFoundError):
                client.adapters.pin("two")
            assert client.generate("one", [1, 2, 3], max_tokens=2, ignore_eos=True).model == "one", "its pin went too"
    finally:
        server.close()
