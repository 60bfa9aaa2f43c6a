"""What the tests of encoders share: an engine over one, and the plain forward of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests import toys
from tests.server.engine.harness import CPU, Harness

from graftwork_server.layers.models.load import load_model


def harness_of(model_dir: Path, **limits: Any) -> Harness:
    return Harness(model_dir, load_model(str(model_dir), CPU, torch.float32, model_dir), **limits)


def prompts(count: int = 7) -> list[list[int]]:
    """With the ids that are padding to BERT (0) and to RoBERTa (1) among them: nothing is padded here."""
    return [[2, *ids[:20], 1, 5, 0, 9] if index % 2 else [2, *ids] for index, ids in enumerate(toys.prompts(count))]


@torch.no_grad()
def states_of(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens, hidden] of the plain forward over one sequence."""
    return model(input_ids=torch.tensor([ids]))[0][0]


@torch.no_grad()
def logits_of(model: Any, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in rows])
