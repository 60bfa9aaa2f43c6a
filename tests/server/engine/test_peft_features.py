"""Everything PEFT's LoRA expresses, served from the files PEFT writes: logits within 1e-4 of PEFT and greedy tokens
equal, in one mixed batch, alone, and after evict and reload."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from tests import toys
from tests.server.engine.harness import CPU, Harness
from transformers import AutoModelForCausalLM

from graftwork_plugins import Artifact, Delta, Strategy
from graftwork_plugins.builtin.ia3 import Ia3
from graftwork_plugins.builtin.lora import Lora
from graftwork_plugins.builtin.prefix import PrefixStrategy
from graftwork_server.engine.describe import base_info
from graftwork_server.engine.model import BaseModel, load_base


@pytest.fixture(scope="module", params=[*toys.CONFIGS, *toys.MIXTURES])
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def base(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = toys.make_model(architecture, tmp_path_factory.mktemp(architecture) / "model")
    return load_base(str(directory), CPU, torch.float32, directory)


@pytest.fixture(scope="module")
def artifacts(architecture: str, base: BaseModel) -> dict[str, Path]:
    folder = Path(base.info.source).parent
    usual = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    configs: dict[str, PeftConfig] = {
        name: LoraConfig(**usual | settings) for name, settings in toys.lora_features(architecture).items()
    }
    configs |= toys.other_peft_configs(architecture)
    return {
        name: toys.make_peft(Path(base.info.source), folder / name, config, seed=seed)
        for seed, (name, config) in enumerate(configs.items())
    }


STRATEGIES: dict[str, Strategy] = {"LORA": Lora(), "IA3": Ia3()}


def load(path: Path, base: BaseModel) -> Sequence[Delta]:
    """What the strategy for the artifact makes of it."""
    strategy = STRATEGIES.get(Artifact(path).json("adapter_config.json")["peft_type"], PrefixStrategy())
    return strategy.load(Artifact(path), base_info(base.engine_model.model, base.info))


def peft_logits(base: BaseModel, artifact: Path | None, rows: list[list[int]]) -> list[torch.Tensor]:
    """[tokens, vocabulary] of each row, by transformers or PEFT alone on the saved files."""
    model: Any = AutoModelForCausalLM.from_pretrained(base.info.source, dtype=torch.float32).eval()
    if artifact is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, artifact).eval()
    with torch.no_grad():
        # PEFT answers for the virtual tokens of prompt tuning too.
        return [model(input_ids=torch.tensor([row])).logits[0, -len(row) :] for row in rows]


def test_mixed_equals_peft_equals_alone_equals_reloaded(base: BaseModel, artifacts: dict[str, Path]) -> None:
    harness = Harness(Path(base.info.source), base, max_step_tokens=200, max_sequences=32)
    deltas = {name: load(path, base) for name, path in artifacts.items()}
    refs: dict[str | None, Any] = {name: harness.place(name, made) for name, made in deltas.items()}
    refs[None] = None
    names = list(refs)
    prompts = dict(zip(names, toys.prompts(len(names)), strict=True))
    for index, name in enumerate(names):
        harness.add(index, prompts[name], refs[name], max_tokens=8)
    harness.run()
    for index, name in enumerate(names):
        prompt, tokens = prompts[name], harness.tokens[index]
        expected = peft_logits(base, artifacts[name] if name else None, [prompt + tokens])[0][len(prompt) - 1 : -1]
        difference = (torch.stack(harness.logits[index]) - expected).abs().max().item()
        assert difference < 1e-4, f"{name}: logits differ by {difference}"
        assert tokens == expected.argmax(-1).tolist(), name
    base_tokens = harness.tokens[names.index(None)]

    for name in artifacts:
        harness.engine.adapters.unload(name)
    assert harness.engine.adapters.used_bytes == 0
    for index, name in enumerate(names):
        if name is not None:
            refs[name] = harness.place(name, deltas[name])
        harness.add(100 + index, prompts[name], refs[name], max_tokens=8)
        harness.run()
        assert harness.tokens[100 + index] == harness.tokens[index], name
    assert harness.tokens[100 + names.index(None)] == base_tokens
