"""Models that the engine's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import toys

from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def llama(llama_dir: Path) -> BaseModel:
    return load_base(str(llama_dir), torch.device("cpu"), torch.float32, llama_dir)
