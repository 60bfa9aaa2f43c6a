"""What PEFT expresses, served in bfloat16: by kernels that compute whole layers, and module by module.

Every rounding differs, so the measure is the exact answer: PEFT's in float32 over the same bfloat16 base. The engine's
log probabilities may be twice as far from it as PEFT's own in bfloat16 are, as root mean squares over a request; mixed
and alone may differ from each other by three times that. Mixtures of experts are left out: where a router's choice is
close, rounding sends a token to another expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import toys
from tests.server.engine.adapters.test_peft_features import load
from tests.server.engine.harness import CPU, Harness
from tests.server.layers.test_fused_layers import MODELS
from transformers import AutoModelForCausalLM

from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base

FUSED = {"llama": "llama with biases", "mistral": "mistral", "qwen3": "qwen3"}
"""Architectures to models of test_fused_layers, whose heads have sizes that the kernels take."""

PLAIN = ("lora", "rank 1", "rank 512", "rslora of ranks by pattern", "some layers", "output layer")
CHANGED = ("all biases", "norms and output layer", "whole mlp", "tokens", "embedding, tied", "dora and biases")
VIRTUAL = ("a long prompt", "projected prefix")

FROM_EXACT, FROM_ALONE = 2, 3
"""Bounds of root mean squares, in those of PEFT's own rounding."""


@pytest.fixture(scope="module", params=[*FUSED, "gpt2", "gemma3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bfloat16") / request.param
    if request.param in FUSED:
        torch.manual_seed(0)
        model = MODELS[FUSED[request.param]]()
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.data += torch.randn_like(parameter) * 0.1
    else:
        model = AutoModelForCausalLM.from_pretrained(toys.make_model(request.param, directory))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def artifacts(model_dir: Path) -> dict[str, Path]:
    configs = toys.peft_configs(model_dir.name)
    chosen = {name: configs[name] for name in (*PLAIN, *CHANGED, *VIRTUAL, "ia3")}
    return toys.make_all(model_dir, model_dir.parent / "adapters", chosen)


Peft = Callable[[str | None, list[int], torch.dtype], torch.Tensor]


@pytest.fixture(scope="module")
def peft(model_dir: Path, artifacts: dict[str, Path]) -> Peft:
    """Name, row and dtype to PEFT's log probabilities [tokens, vocabulary]."""
    models: dict[tuple[str | None, torch.dtype], Any] = {}

    @torch.no_grad()
    def logprobs(name: str | None, row: list[int], dtype: torch.dtype) -> torch.Tensor:
        if (name, dtype) not in models:
            model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if name is not None:
                    model = PeftModel.from_pretrained(model, artifacts[name], autocast_adapter_dtype=False)
            models[name, dtype] = model.to(dtype).eval()
        logits: torch.Tensor = models[name, dtype](input_ids=torch.tensor([row])).logits[0, -len(row) :]
        return logits.float().log_softmax(-1)

    return logprobs


def count_whole_layers(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every layer that kernels compute whole."""
    calls: list[int] = []
    kernels = base.engine_model.kernels
    if kernels is not None and kernels.layers is not None:
        finish = kernels.layers.finish
        monkeypatch.setattr(kernels.layers, "finish", lambda *args: (calls.append(1), finish(*args)))
    return calls


def rms(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


def test_it_is_as_near_to_the_exact_answer_as_peft_is(
    model_dir: Path, artifacts: dict[str, Path], peft: Peft, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(model_dir), CPU, torch.bfloat16, model_dir)
    whole_layers = count_whole_layers(base, monkeypatch)
    harness = Harness(model_dir, base, max_step_tokens=200, max_sequences=32)
    refs: dict[str | None, Any] = {name: harness.place(name, load(path, base)) for name, path in artifacts.items()}
    names: list[str | None] = [*artifacts, None]
    prompts = {name: [token % 128 for token in prompt] for name, prompt in zip(names, toys.prompts(len(names)))}  # noqa: B905
    changing = {name for name, path in artifacts.items() if bind(base, name, load(path, base), place=False).changes}
    assert changing.isdisjoint({*PLAIN, *VIRTUAL})
    assert {*CHANGED, "ia3"} - changing <= {"all biases"}, "Mistral and Qwen3 have none"
    runs: list[list[str | None]] = [[name] for name in names]  # alone, all of them, and those that change no modules
    runs += [names, [*PLAIN, *VIRTUAL, None]]
    answers: dict[str | None, list[torch.Tensor]] = {name: [] for name in names}
    for number, together in enumerate(runs):
        before, steps = len(whole_layers), harness.steps
        for index, name in enumerate(together):
            harness.add(100 * number + index, prompts[name], refs.get(name), max_tokens=6)
        harness.run()
        kernels = base.engine_model.kernels
        if base.engine_model.fused_layers and kernels is not None and kernels.layers is not None:
            counted = (harness.steps - steps) * len(base.engine_model.fused_layers)
            if changing.isdisjoint(together) and not kernels.layers.has_tiles:
                assert len(whole_layers) > before, "in vectors, steps of few rows alone"
            elif changing.isdisjoint(together):
                assert len(whole_layers) - before == counted, together
            else:
                assert len(whole_layers) - before < counted, together
        for index, name in enumerate(together):
            tokens, logits = (of[100 * number + index] for of in (harness.tokens, harness.logits))
            answers[name].append(torch.stack(logits).log_softmax(-1))
            row, sampled = prompts[name] + tokens, slice(-len(tokens) - 1, -1)
            exact, rounded = (peft(name, row, dtype)[sampled] for dtype in (torch.float32, torch.bfloat16))
            of_peft = rms(rounded - exact)
            assert rms(answers[name][-1] - exact) < FROM_EXACT * of_peft, (name, together)
            # Of the first token: where rounding chooses another, what follows is another text.
            assert rms(answers[name][-1][0] - answers[name][0][0]) < FROM_ALONE * of_peft, (name, together)
