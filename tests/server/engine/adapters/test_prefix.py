"""Virtual tokens: cut into chunks, preempted, scored, too long, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig
from tests import toys
from tests.server.engine.harness import CPU, Harness
from transformers import AutoModelForCausalLM

from graftwork_plugins import Artifact, Prefix
from graftwork_plugins.builtin.strategies.prefix import PrefixStrategy
from graftwork_server.base.describe import base_info
from graftwork_server.errors import FailedPrecondition
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base

CONFIGS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=19),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=33),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = toys.make_model("gpt2", tmp_path_factory.mktemp("prefix") / "model")
    return load_base(str(directory), CPU, torch.float32, directory)


@pytest.fixture(scope="module", params=list(CONFIGS))
def artifact(request: pytest.FixtureRequest, base: BaseModel) -> Path:
    directory = Path(base.info.source)
    return toys.make_peft(directory, directory.parent / request.param, CONFIGS[request.param])


def placed(harness: Harness, artifact: Path) -> Any:
    info = base_info(harness.base.engine_model.model, harness.base.info)
    return harness.place(str(artifact), PrefixStrategy().load(Artifact(artifact), info))


@torch.no_grad()
def reference(base: BaseModel, artifact: Path, row: list[int]) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base.info.source, dtype=torch.float32)
    logits: torch.Tensor = PeftModel.from_pretrained(model, artifact).eval()(input_ids=torch.tensor([row])).logits[0]
    return logits[-len(row) :]


def check(harness: Harness, artifact: Path, request_id: int, prompt: list[int]) -> None:
    tokens = harness.tokens[request_id]
    expected = reference(harness.base, artifact, prompt + tokens)[len(prompt) - 1 : -1]
    assert tokens == expected.argmax(-1).tolist()
    torch.testing.assert_close(torch.stack(harness.logits[request_id]), expected, atol=1e-4, rtol=0)


def test_a_prefix_longer_than_a_step(base: BaseModel, artifact: Path) -> None:
    harness = Harness(Path(base.info.source), base, max_step_tokens=7)
    ref = placed(harness, artifact)
    prompts = toys.prompts(3)
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, ref)
    harness.add(9, prompts[0])
    harness.run()
    for index, prompt in enumerate(prompts):
        check(harness, artifact, index, prompt)


def test_preempted_and_computed_again(base: BaseModel, artifact: Path) -> None:
    block_bytes = 16 * sum(shape.bytes_per_token(torch.float32) for shape in base.layer_shapes)
    harness = Harness(Path(base.info.source), base, kv_memory_bytes=9 * block_bytes)
    ref = placed(harness, artifact)
    prompts = [prompt[:5] for prompt in toys.prompts(3)]
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, ref, max_tokens=40)
    assert harness.engine.kv_tokens < 3 * (19 + 5 + 40), "the sequences do not fit side by side"
    harness.run()
    for index, prompt in enumerate(prompts):
        tokens = harness.tokens[index]
        assert tokens == reference(base, artifact, prompt + tokens)[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_prompt_logprobs_are_of_the_own_tokens(base: BaseModel, artifact: Path) -> None:
    harness = Harness(Path(base.info.source), base, max_step_tokens=9)
    ref = placed(harness, artifact)
    prompt = toys.prompts(1, seed=5)[0]
    harness.add(1, prompt, ref, prompt_logprobs=0, max_tokens=0)
    harness.run()
    scored = harness.prompt_logprobs[1]
    logprobs = reference(base, artifact, prompt).log_softmax(-1)
    assert [entry.token_id for entry in scored] == prompt
    assert scored[0].logprob is None
    for position in range(1, len(prompt)):
        assert scored[position].logprob == pytest.approx(logprobs[position - 1, prompt[position]].item(), abs=1e-4)


def test_what_does_not_fit_with_the_prefix_is_told_and_others_go_on(base: BaseModel, artifact: Path) -> None:
    harness = Harness(Path(base.info.source), base)
    ref = placed(harness, artifact)
    virtual = CONFIGS[artifact.name].num_virtual_tokens
    fits = base.info.context_tokens - virtual
    harness.add(1, [5] * (fits - 9), ref, max_tokens=10)
    harness.add(2, [5] * (fits - 10), ref, max_tokens=10)
    harness.add(3, [5, 6], max_tokens=3)
    harness.run()
    error = harness.finished[1].error
    assert error is not None
    assert error.reason == "PROMPT_TOO_LONG"
    assert f"so {fits} of the request's own" in error.message
    assert len(harness.tokens[2]) == 10
    assert len(harness.tokens[3]) == 3
    assert harness.engine.blocks.free_blocks == harness.engine.blocks.num_blocks


def kv(layers: int = 3, heads: int = 6, tokens: int = 4, dim: int = 8, fill: float = 1.0) -> list[torch.Tensor]:
    return [torch.full((heads, tokens, dim), fill) for _ in range(layers)]


@pytest.mark.parametrize(
    ("delta", "says"),
    [
        (Prefix(embeddings=torch.ones(4, 47)), r"\[4, 47\]; this base takes \[virtual tokens, 48\]"),
        (Prefix(embeddings=torch.ones(0, 48)), r"\[0, 48\]"),
        (Prefix(embeddings=torch.full((4, 48), float("nan"))), "NaN"),
        (Prefix(embeddings=torch.ones(256, 48)), "leave no room in 256"),
        (Prefix(embeddings=torch.ones(4, 48), keys=kv()), "has both"),
        (Prefix(keys=kv(2), values=kv(2)), "keys of 2 and values of 2 layers, not 3"),
        (Prefix(keys=kv(), values=kv(tokens=5)), r"values of layer 0 are \[6, 5, 8\]"),
        (Prefix(keys=kv(heads=2), values=kv()), r"keys of layer 0 are \[2, 4, 8\].*\[6, virtual tokens, 8\]"),
        (Prefix(keys=kv(), values=kv(fill=float("inf"))), "values of layer 0 holds NaN or infinite"),
        (Prefix(), "keys of 0"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(base: BaseModel, delta: Prefix, says: str) -> None:
    with pytest.raises(FailedPrecondition, match=says) as raised:
        bind(base, "d", [delta])
    assert raised.value.reason == "ARTIFACT_REJECTED"
