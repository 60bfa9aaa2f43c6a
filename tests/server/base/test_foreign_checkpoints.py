"""Whole checkpoints with tensors that transformers leaves out: served as transformers answers; others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import toys
from tests.server.engine.harness import Harness, Reference, assert_greedy_matches

from graftwork_plugins import Artifact
from graftwork_plugins.builtin.strategies.full import FullTuning
from graftwork_server.base.describe import base_info
from graftwork_server.errors import FailedPrecondition

LEFT_OUT = {
    "llama": {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.cos_cached": torch.ones(1, 1, 9, 8),
        "model.layers.1.self_attn.rotary_emb.sin_cached": torch.ones(1, 1, 9, 8),
    },
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(float("-inf")),
    },
}


@pytest.mark.parametrize("architecture", LEFT_OUT)
def test_it_is_served_as_transformers_answers(architecture: str, tmp_path: Path) -> None:
    base_dir = toys.make_model(architecture, tmp_path / "base")
    tuned = toys.make_checkpoint(base_dir, tmp_path / "tuned")
    weights = tuned / "model.safetensors"
    own = load_file(weights)
    save_file(own | LEFT_OUT[architecture], weights, metadata={"format": "pt"})
    harness = Harness(base_dir)
    info = base_info(harness.base.engine_model.model, harness.base.info)
    ref = harness.place("tuned", FullTuning().load(Artifact(tuned), info))
    prompt = toys.prompts(1)[0]
    harness.add(1, prompt, ref)
    harness.run()
    assert_greedy_matches(harness, Reference(tuned, {}), 1, prompt, None)
    for name in ("model.layers.0.adapter.weight", "value_head.weight"):
        save_file(own | {name: torch.ones(4)}, weights)
        with pytest.raises(FailedPrecondition, match=f"no tensor {name}"):
            harness.place("other", FullTuning().load(Artifact(tuned), info))
