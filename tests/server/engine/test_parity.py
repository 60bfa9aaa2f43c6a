"""The engine against transformers and PEFT in fp32: logits within 1e-4, greedy tokens equal, alone and mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import toys
from tests.server.engine.harness import Harness, Reference, assert_greedy_matches, deltas_of
from transformers import AutoModelForCausalLM

ADAPTERS = {
    "all-linear": {"r": 8},
    "rslora": {"r": 4, "use_rslora": True},
    "one-rank": {"r": 1, "lora_alpha": 2},
}


@pytest.fixture(scope="module", params=[*toys.CONFIGS, *toys.MIXTURES])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_model(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def adapters(model_dir: Path) -> dict[str, Path]:
    return {
        name: toys.make_adapter(model_dir, model_dir.parent / name, seed=seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }


def test_base_generation_equals_transformers_generate(model_dir: Path) -> None:
    harness = Harness(model_dir, max_step_tokens=24)
    for index, prompt in enumerate(toys.prompts(5)):
        harness.add(index, prompt, max_tokens=16, ignore_eos=False)
    harness.run()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for index, prompt in enumerate(toys.prompts(5)):
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
        assert harness.tokens[index] == generated[0, len(prompt) :].tolist()


def test_mixed_batch_equals_peft_and_solo(model_dir: Path, adapters: dict[str, Path]) -> None:
    harness = Harness(model_dir, max_step_tokens=48, max_sequences=8)
    refs = {name: harness.place(name, deltas_of(path)) for name, path in adapters.items()}
    reference = Reference(model_dir, adapters)
    names: list[str | None] = [*adapters, None]
    prompts = toys.prompts(8)
    for index, prompt in enumerate(prompts):
        name = names[index % 4]
        harness.add(index, prompt, refs[name] if name else None)
    harness.run()
    for index, prompt in enumerate(prompts):
        assert_greedy_matches(harness, reference, index, prompt, names[index % 4])

    alone = {}
    for index, prompt in enumerate(prompts[:4]):
        name = names[index]
        harness.add(100 + index, prompt, refs[name] if name else None)
        harness.run()
        alone[index] = harness.tokens[100 + index]
    assert alone == {index: harness.tokens[index] for index in range(4)}


def test_prompt_logprobs_equal_the_reference(model_dir: Path, adapters: dict[str, Path]) -> None:
    harness = Harness(model_dir, max_step_tokens=16)
    ref = harness.place("rslora", deltas_of(adapters["rslora"]))
    reference = Reference(model_dir, {"rslora": adapters["rslora"]})
    prompt = toys.prompts(1, seed=3)[0] * 2
    harness.add(1, prompt, ref, prompt_logprobs=3, max_tokens=0)
    harness.run()
    logprobs = reference.logits(prompt, "rslora").log_softmax(-1)
    scored = harness.prompt_logprobs[1]
    assert [entry.token_id for entry in scored] == prompt
    assert scored[0].logprob is None
    for position in range(1, len(prompt)):
        row = logprobs[position - 1]
        assert scored[position].logprob == pytest.approx(row[prompt[position]].item(), abs=1e-4)
        values, ids = row.topk(3)
        assert [token for token, _ in scored[position].top] == ids.tolist()
        assert [value for _, value in scored[position].top] == pytest.approx(values.tolist(), abs=1e-4)
