"""Everything of PEFT that is served, from the files PEFT writes, on every architecture of decoders: logits within 1e-4
of PEFT and greedy tokens equal, in one mixed batch, alone, and after evict and reload; with the kernels and without."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tests import toys
from tests.server.engine.harness import CPU, Harness
from transformers import AutoModelForCausalLM

from graftwork_plugins import Artifact, Delta, Strategy
from graftwork_plugins.builtin.strategies.ia3 import Ia3
from graftwork_plugins.builtin.strategies.lora import Lora
from graftwork_plugins.builtin.strategies.prefix import PrefixStrategy
from graftwork_server.base.describe import base_info
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base

Expected = Callable[[str | None, list[int], list[int]], torch.Tensor]
"""Name, prompt and tokens to PEFT's logits for the tokens, [tokens, vocabulary]."""


@pytest.fixture(scope="module", params=[*toys.CONFIGS, *toys.MIXTURES])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_model(request.param, tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def artifacts(model_dir: Path) -> dict[str, Path]:
    return toys.make_all(model_dir, model_dir.parent / "adapters", toys.peft_configs(model_dir.name))


@pytest.fixture(scope="module")
def expected(model_dir: Path, artifacts: dict[str, Path]) -> Expected:
    """Both ways of computing choose the same tokens, so that PEFT is asked once."""
    known: dict[tuple[str | None, tuple[int, ...]], torch.Tensor] = {}

    def logits(name: str | None, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        row = [*prompt, *tokens]
        if (name, tuple(row)) not in known:
            known[name, tuple(row)] = peft_logits(model_dir, artifacts[name] if name else None, row)
        return known[name, tuple(row)][len(prompt) - 1 : -1]

    return logits


STRATEGIES: dict[str, Strategy] = {"LORA": Lora(), "IA3": Ia3()}


def load(path: Path, base: BaseModel) -> Sequence[Delta]:
    """What the strategy for the artifact makes of it."""
    strategy = STRATEGIES.get(Artifact(path).json("adapter_config.json")["peft_type"], PrefixStrategy())
    return strategy.load(Artifact(path), base_info(base.engine_model.model, base.info))


def peft_logits(model_dir: Path, artifact: Path | None, row: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] of a row, by transformers or PEFT alone on the saved files."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if artifact is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, artifact).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([row])).logits[0]
    return logits[-len(row) :]  # PEFT answers for the virtual tokens of prompt tuning too


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "torch"])
def test_mixed_equals_peft_equals_alone_equals_reloaded(
    model_dir: Path, artifacts: dict[str, Path], expected: Expected, native: bool
) -> None:
    base = load_base(str(model_dir), CPU, torch.float32, model_dir, native=native)
    harness = Harness(model_dir, base, max_step_tokens=200, max_sequences=32)
    deltas = {name: load(path, base) for name, path in artifacts.items()}
    refs: dict[str | None, Any] = {name: harness.place(name, made) for name, made in deltas.items()}
    refs[None] = None
    names = list(refs)
    prompts = dict(zip(names, toys.prompts(len(names)), strict=True))
    for index, name in enumerate(names):
        harness.add(index, prompts[name], refs[name], max_tokens=8)
    harness.run()
    for index, name in enumerate(names):
        tokens = harness.tokens[index]
        of_peft = expected(name, prompts[name], tokens)
        difference = (torch.stack(harness.logits[index]) - of_peft).abs().max().item()
        assert difference < 1e-4, f"{name}: logits differ by {difference}"
        assert tokens == of_peft.argmax(-1).tolist(), name

    for name in artifacts:
        harness.engine.adapters.unload(name)
    assert harness.engine.adapters.used_bytes == 0
    for index, name in enumerate(names):
        if name is not None:
            refs[name] = harness.place(name, deltas[name])
        harness.add(100 + index, prompts[name], refs[name], max_tokens=8)
        harness.run()
        assert harness.tokens[100 + index] == harness.tokens[index], name
        alone, mixed = (torch.stack(harness.logits[number]) for number in (100 + index, index))
        torch.testing.assert_close(alone, mixed, atol=1e-4, rtol=0, msg=name)


def test_preempted_and_computed_again(model_dir: Path, artifacts: dict[str, Path], expected: Expected) -> None:
    """In a cache of a quarter of what the sequences need together."""
    base = load_base(str(model_dir), CPU, torch.float32, model_dir)
    block_bytes = BLOCK_TOKENS * sum(shape.bytes_per_token(base.dtype) for shape in base.layer_shapes)
    harness = Harness(model_dir, base, max_step_tokens=64, kv_memory_bytes=6 * block_bytes)
    names: list[str | None] = ["lora", "dora and biases", "embedding, tied", "tokens", "ia3", "projected prefix", None]
    refs = {name: harness.place(name, load(artifacts[name], base)) for name in names if name is not None}
    prompts = dict(zip(names, toys.prompts(len(names), seed=2), strict=True))
    preempted = set()
    for index, name in enumerate(names):
        harness.add(index, prompts[name], refs.get(name) if name else None, max_tokens=20)
    while harness.engine.active:
        harness.step()
        preempted |= {sequence.digest for sequence in harness.engine._admission._preempted}
    assert len(preempted) > 2
    for index, name in enumerate(names):
        tokens = harness.tokens[index]
        of_peft = expected(name, prompts[name], tokens)
        torch.testing.assert_close(torch.stack(harness.logits[index]), of_peft, atol=1e-4, rtol=0, msg=name)
        assert tokens == of_peft.argmax(-1).tolist(), name
    assert harness.engine.blocks.free_blocks == harness.engine.blocks.num_blocks == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_files_of_other_dtypes(llama_dir: Path, llama: BaseModel, tmp_path: Path, dtype: torch.dtype) -> None:
    """Of every part that an adapter can have."""
    config = LoraConfig(
        target_modules=["q_proj", "down_proj"], modules_to_save=["norm", "embed_tokens"], use_dora=True, r=4
    )
    artifact = toys.make_peft(llama_dir, tmp_path, config)
    file = artifact / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    harness = Harness(llama_dir, llama)
    prompt = toys.prompts(1)[0]
    harness.add(1, prompt, harness.place("d", load(artifact, llama)))
    harness.run()
    of_peft = peft_logits(llama_dir, artifact, prompt + harness.tokens[1])[len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack(harness.logits[1]), of_peft, atol=1e-4, rtol=0)
