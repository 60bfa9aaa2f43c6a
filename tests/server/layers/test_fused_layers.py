"""Decoder layers computed whole by kernels, against the same model computed module by module, in bfloat16.

Both round differently, so log probabilities are compared, with the bound of bfloat16's 8 bits; in float32 there are no
such kernels, and test_parity holds what is served there against PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import toys
from tests.server.engine.harness import CPU, Harness, deltas_of
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from graftwork_plugins import Replace
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base
from graftwork_server.types import AdapterRef

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    directory = tmp_path_factory.mktemp("fused") / "model"
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(model_dir: Path) -> BaseModel:
    loaded = load_base(str(model_dir), CPU, torch.bfloat16, model_dir)
    if loaded.engine_model.kernels is None or loaded.engine_model.kernels.layers is None:
        pytest.skip("no compiler, or no bfloat16 instructions")
    return loaded


def answers(base: BaseModel, model_dir: Path, fused: bool, deltas: dict[str, list[Any]]) -> dict[int, Any]:
    """Log probabilities of prompts and of continuations, for the base and each adapter, all in mixed batches."""
    if not fused:
        base.engine_model.unfuse_layers()
    try:
        harness = Harness(model_dir, base, max_step_tokens=160)
        refs: list[AdapterRef | None] = [None, *(harness.place(name, delta) for name, delta in deltas.items())]
        for index, length in enumerate((3, 40, 17, 75, 1, 33, 150, 2)):
            prompt = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(index)).tolist()
            harness.add(index, prompt, refs[index % len(refs)], prompt_logprobs=0, max_tokens=6)
        harness.run()
        return {
            index: torch.tensor([entry.logprob or 0.0 for entry in harness.prompt_logprobs[index]])
            for index in harness.finished
        } | {100 + index: torch.stack(logits).log_softmax(-1) for index, logits in harness.logits.items()}
    finally:
        if not fused:
            base.engine_model.fuse_layers(base.attention_settings)


def adapters(model_dir: Path) -> dict[str, list[Any]]:
    ranks = {"sixteen": {"r": 16}, "three": {"r": 3, "target_modules": ["q_proj", "down_proj"]}, "forty": {"r": 40}}
    return {
        name: deltas_of(toys.make_adapter(model_dir, model_dir.parent / name, seed=seed, **config))
        for seed, (name, config) in enumerate(ranks.items())
    }


def test_every_layer_is_computed_whole(base: BaseModel) -> None:
    assert len(base.engine_model.fused_layers) == SIZES["num_hidden_layers"]


def test_whole_layers_answer_as_their_modules_do(base: BaseModel, model_dir: Path) -> None:
    deltas = adapters(model_dir)
    plain, fused = (answers(base, model_dir, whole, deltas) for whole in (False, True))
    for index in range(8):
        assert (plain[index] - fused[index]).abs().mean() < 0.03
        # Of decoded tokens the first is compared: where rounding chooses another, what follows is another text.
        torch.testing.assert_close(plain[100 + index][0], fused[100 + index][0], atol=0.15, rtol=0)
    # The adapters are there at all: other ones give the same prompts other answers.
    others = dict(zip(deltas, reversed(deltas.values()), strict=True))
    assert (answers(base, model_dir, True, others)[101][0] - fused[101][0]).abs().max() > 0.5


def test_a_batch_with_changed_modules_is_computed_module_by_module(base: BaseModel, model_dir: Path) -> None:
    zeros = {"weight": torch.zeros(SIZES["hidden_size"], SIZES["intermediate_size"])}
    harness = Harness(model_dir, base)
    ref = harness.place("silent", [Replace(module=f"model.layers.{i}.mlp.down_proj", tensors=zeros) for i in range(2)])
    prompt = [5, 9, 40, 7]
    harness.add(1, prompt, ref, max_tokens=1)
    harness.add(2, prompt, None, max_tokens=1)
    harness.run()
    alone = Harness(model_dir, base)
    alone.add(2, prompt, None, max_tokens=1)
    alone.run()
    torch.testing.assert_close(harness.logits[2][0], alone.logits[2][0], atol=0.15, rtol=0)
    assert (harness.logits[1][0] - harness.logits[2][0]).abs().max() > 0.3


def test_a_float32_base_has_no_such_layers(model_dir: Path) -> None:
    assert load_base(str(model_dir), CPU, torch.float32, model_dir).engine_model.fused_layers == []
