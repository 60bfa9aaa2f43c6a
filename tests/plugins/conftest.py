"""Models and an adapter that the tests of LoRA share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import toys
from tests.plugins.lora_harness import ARCHITECTURES, plain_model

from graftwork_plugins import BaseInfo
from graftwork_plugins.testing import base_handle


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models by architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {name: toys.make_model(name, folder / name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def info(models: dict[str, Path]) -> BaseInfo:
    """The Llama as strategies see it."""
    return base_handle(plain_model(models["llama"])).info


@pytest.fixture(scope="module")
def adapter(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary adapter of the Llama."""
    return toys.make_adapter(models["llama"], tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "v_proj"])
