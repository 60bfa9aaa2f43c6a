"""One toy model and one server that most tests share: starting a server costs seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import toys
from tests.e2e.serving import Server
from transformers import AutoTokenizer

from graftwork import Client


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model whose context is so long that a test can have a stream that never ends by itself."""
    return toys.make_text_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1_000_000)


@pytest.fixture(scope="session")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tests share; each uses names of its own."""
    running = Server(model_dir, tmp_path_factory.mktemp("shared") / "data")
    yield running
    running.close()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    """A client of the shared server."""
    with server.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Any:
    """transformers' own tokenizer of the shared model."""
    return AutoTokenizer.from_pretrained(model_dir)
