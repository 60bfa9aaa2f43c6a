"""Files as other tools write them, uploaded and asked over gRPC: served as PEFT and transformers answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests import toys
from tests.e2e.reference import Reference

from graftwork import Client

PROMPT = [1, 20, 45, 77, 130, 99, 7, 3, 100]


def add(
    directory: Path, config_file: str, config: dict[str, Any], weights: str, tensors: dict[str, torch.Tensor]
) -> None:
    """Adds keys and tensors to saved files."""
    document = json.loads((directory / config_file).read_text()) | config
    (directory / config_file).write_text(json.dumps(document))
    save_file(load_file(directory / weights) | tensors, directory / weights, metadata={"format": "pt"})


def test_adapters_and_checkpoints_of_other_tools(client: Client, model_dir: Path, tmp_path: Path) -> None:
    unsloth = {
        "auto_mapping": {"base_model_class": "X", "parent_library": "transformers.models.x", "unsloth_fixed": True},
        "unsloth_version": "2026.3.1",
        "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    }
    inverse = {"base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    adapter = toys.make_adapter(model_dir, tmp_path / "adapter", r=4)
    add(adapter, "adapter_config.json", unsloth, "adapter_model.safetensors", inverse)
    (adapter / "trainer_state.json").write_text('{"epoch": 1.0}')
    checkpoint = toys.make_checkpoint(model_dir, tmp_path / "checkpoint")
    raised = {"max_position_embeddings": 2_000_000, "unsloth_fixed": True, "torch_dtype": "bfloat16"}
    old = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    add(checkpoint, "config.json", raised, "model.safetensors", old)
    for name, directory, reference in (
        ("foreign-adapter", adapter, Reference(model_dir, adapter)),
        ("foreign-checkpoint", checkpoint, Reference(checkpoint)),
    ):
        client.adapters.create(name, directory)
        answer = client.generate(name, PROMPT, max_tokens=8, ignore_eos=True)
        reference.assert_greedy(PROMPT, answer.token_ids, name)
        reference.assert_scored(PROMPT, [token.logprob for token in client.score(name, PROMPT).tokens])
