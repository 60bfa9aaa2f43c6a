"""What tests of the loop share: a run in this process over a toy model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork_plugins import IGNORED_LABEL, TrainingRow
from graftwork_plugins.builtin.strategies.lora import Lora, LoraConfig
from graftwork_plugins.testing import base_handle, make_model
from graftwork_server.kernels.attention import packed
from graftwork_server.tuning.tuner.checkpoint import Checkpoints
from graftwork_server.tuning.tuner.loop import Run
from graftwork_server.tuning.tuner.reports import Reports


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Toy models are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def uneven_rows() -> list[TrainingRow]:
    """Rows of different lengths and shares of loss, which is where wrong accumulation shows."""
    rows = []
    for index, (length, prompt) in enumerate([(5, 1), (19, 17), (12, 3), (3, 1), (30, 10), (8, 7)]):
        ids = [(7 * index + 3 * position) % 60 for position in range(length)]
        rows.append(TrainingRow(ids, [IGNORED_LABEL] * prompt + ids[prompt:]))
    return rows


def make_run(tmp_path: Path, **settings: Any) -> Run:
    config = LoraConfig.model_validate({"r": 4, "lora_alpha": 8} | settings)
    model: Any = make_model()
    model.set_attn_implementation(packed.NAME)
    torch.manual_seed(0)
    trainable = Lora().build(base_handle(model), config)
    with torch.no_grad():
        for name, parameter in trainable.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    rows = uneven_rows()
    checkpoints, reports = Checkpoints(tmp_path, {}), Reports(tmp_path / "reports", lambda event: None)
    return Run(Lora(), config, trainable, torch.device("cpu"), rows, rows, checkpoints, reports)
