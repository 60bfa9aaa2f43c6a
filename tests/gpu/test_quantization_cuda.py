"""Quantised bases on a GPU: the answers of the dequantised model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import toys
from tests.server.base.quantization_harness import KINDS, assert_within_bounds, reference_logits
from tests.server.engine.adapters.test_peft_features import load
from tests.server.engine.harness import Harness

from graftwork_server.layers.models.causal import load_base

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "phi3"])
def test_mixed_equals_peft_over_the_dequantised_model(architecture: str, kind: str, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    directory = toys.make_model(architecture, tmp_path / architecture)
    base = load_base(str(directory), torch.device("cuda"), torch.float32, tmp_path, quantization=kind)
    artifact = toys.make_adapter(directory, tmp_path / "adapter")
    harness = Harness(directory, base)
    ref = harness.place("adapter", load(artifact, base))
    prompts = toys.prompts(4)
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, ref if index % 2 else None)
    harness.run()
    for index, prompt in enumerate(prompts):
        row = prompt + harness.tokens[index]
        expected = reference_logits(base, artifact if index % 2 else None, row)[len(prompt) - 1 : -1]
        assert_within_bounds(base, torch.stack(harness.logits[index]).cpu(), expected, index)
