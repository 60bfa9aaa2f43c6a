"""What the tests of several strategies share. Nobody writes into these folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import toys
from tests.plugins.reference import plain_model

from graftwork_plugins import BaseInfo
from graftwork_plugins.testing import base_handle


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models by architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {name: toys.make_model(name, folder / name) for name in ("llama", "gpt2", "phi3", "mixtral")}


@pytest.fixture(scope="session")
def llama(models: dict[str, Path]) -> Path:
    """The Llama among the models."""
    return models["llama"]


@pytest.fixture(scope="session")
def info(llama: Path) -> BaseInfo:
    """The Llama as strategies see it."""
    return base_handle(plain_model(llama)).info


@pytest.fixture(scope="session")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary LoRA adapter of the Llama."""
    return toys.make_adapter(llama, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "v_proj"])
