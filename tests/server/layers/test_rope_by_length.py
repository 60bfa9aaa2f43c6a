"""LongRoPE and its kind: each sequence has the factors of its own length, whatever runs beside it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from tests import toys
from tests.server.engine.harness import CPU, Harness, Reference, deltas_of
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PhimoeConfig

from graftwork_plugins import Artifact, FullWeights
from graftwork_plugins.builtin.strategies.prefix import PrefixStrategy
from graftwork_server.base.describe import base_info
from graftwork_server.base.weights import map_base_model
from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.attention.packed import packed_rows
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.layers.models import causal as engine_model
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base

BORDER = 64


def longrope(half: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1 + 0.02 * i for i in range(half)],
        "long_factor": [1.5 + 3.0 * i for i in range(half)],
        **more,
    }


CONFIGS: dict[str, Any] = {
    "phi3": Phi3Config(**toys.COMMON, original_max_position_embeddings=BORDER, rope_parameters=longrope(4)),
    # As Phi-4-mini: tied, and only a part of each head is rotated.
    "phi4-mini": Phi3Config(
        **toys.COMMON | {"hidden_size": 96},
        tie_word_embeddings=True,
        original_max_position_embeddings=BORDER,
        rope_parameters=longrope(6, partial_rotary_factor=0.75),
    ),
    "llama": LlamaConfig(
        **toys.COMMON, rope_parameters=longrope(4, original_max_position_embeddings=BORDER, factor=4.0)
    ),
    # As Phi-3.5-MoE: its class scales by the length too.
    "phimoe": PhimoeConfig(
        **toys.COMMON | {"num_hidden_layers": 2},
        num_local_experts=2,
        num_experts_per_tok=2,
        original_max_position_embeddings=BORDER,
        rope_parameters=longrope(
            4, short_mscale=1.1, long_mscale=1.3, original_max_position_embeddings=BORDER, factor=4.0
        ),
    ),
    "gemma3": Gemma3TextConfig(
        **toys.COMMON,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": longrope(8, original_max_position_embeddings=BORDER),
        },
    ),
}


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, toys.VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SHORT, LONG, CROSSING = ids(20, 1), ids(90, 2), ids(BORDER - 6, 3)


def save_model(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=list(CONFIGS))
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def base(model_dir: Path) -> BaseModel:
    return load_base(str(model_dir), CPU, torch.float32, model_dir)


def assert_as_alone(
    harness: Harness, reference: Reference, request_id: int, prompt: list[int], adapter: str | None = None
) -> None:
    """Every token is the most likely one, and its logits are those, after all that stood before it by itself: what
    Phi-3's generate gives, which drops its cache where the factors change."""
    tokens = harness.tokens[request_id]
    assert tokens, harness.finished[request_id]
    expected = torch.stack([reference.logits(prompt + tokens[:count], adapter)[-1] for count in range(len(tokens))])
    torch.testing.assert_close(torch.stack(harness.logits[request_id]), expected, atol=1e-4, rtol=0)
    assert tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("step_tokens", [1024, 24])
def test_rows_of_all_lengths_together(
    model_dir: Path, base: BaseModel, tmp_path: Path, prefix_cache: bool, step_tokens: int
) -> None:
    path = toys.make_adapter(model_dir, tmp_path / "adapter", target_modules=["o_proj", "lm_head"])
    harness = Harness(model_dir, base, prefix_cache=prefix_cache, max_step_tokens=step_tokens)
    reference = Reference(model_dir, {"adapter": path})
    ref = harness.place("adapter", deltas_of(path))
    for again in range(2):
        for index, prompt in enumerate((SHORT, LONG, CROSSING, SHORT)):
            harness.add(100 * again + 10 * index, prompt, max_tokens=16)
            harness.add(100 * again + 10 * index + 1, prompt, ref, max_tokens=16)
        harness.run()
        for index, prompt in enumerate((SHORT, LONG, CROSSING, SHORT)):
            assert_as_alone(harness, reference, 100 * again + 10 * index, prompt)
            assert_as_alone(harness, reference, 100 * again + 10 * index + 1, prompt, "adapter")
    # Found again in the cache: what has the same factors, the crossing one's first 58 tokens among it.
    found = [harness.cached[100 + 10 * index] for index in range(3)]
    assert found == ([16, 80, 48] if prefix_cache else [0, 0, 0])


@pytest.mark.parametrize("name", ["phi3", "phi4-mini", "phimoe"])
def test_generate_of_transformers_agrees(tmp_path: Path, name: str) -> None:
    """The classes that drop their cache where the factors change."""
    model_dir = save_model(name, tmp_path / "model")
    harness = Harness(model_dir)
    prompts = [SHORT, LONG, CROSSING]
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, max_tokens=24)
    harness.run()
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for index, prompt in enumerate(prompts):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert harness.tokens[index] == expected[0, len(prompt) :].tolist()


def test_the_cache_never_mixes_factors(model_dir: Path, base: BaseModel) -> None:
    """A long prompt that begins like a short one, the other way round, and one that grows into what is cached."""
    harness = Harness(model_dir, base)
    reference = Reference(model_dir, {})
    course = [LONG[:50], LONG, LONG[:50], LONG[:60], LONG[:60] + ids(40, 9)]
    for index, prompt in enumerate(course):
        harness.add(index, prompt, max_tokens=12)
        harness.run()
        assert_as_alone(harness, reference, index, prompt)
    # The last one finds what the long one left, not what the short ones did.
    assert [harness.cached[index] for index in range(5)] == [0, 0, 48, 48, 48]


def test_sequences_that_are_preempted_and_come_back(model_dir: Path, base: BaseModel) -> None:
    per_block = BLOCK_TOKENS * sum(shape.bytes_per_token(base.dtype) for shape in base.layer_shapes)
    harness = Harness(model_dir, base, kv_memory_bytes=10 * per_block, prefix_cache=False)
    reference = Reference(model_dir, {})
    prompts = [CROSSING, ids(BORDER - 3, 5), SHORT]
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, max_tokens=30)
    harness.run()
    for index, prompt in enumerate(prompts):
        assert_as_alone(harness, reference, index, prompt)
    assert harness.rows[1] > 2 * len(prompts[1]) + 30, "it was preempted beside the switch"


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_count_and_turn_with_the_rest(
    model_dir: Path, base: BaseModel, tmp_path: Path, kind: Any
) -> None:
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=19)
    path = toys.make_peft(model_dir, tmp_path / "virtual", config, 1)
    harness = Harness(model_dir, base)
    reference = Reference(model_dir, {"virtual": path})
    info = base_info(base.engine_model.model, base.info)
    ref = harness.place("virtual", PrefixStrategy().load(Artifact(path), info))
    prompts = [SHORT, ids(BORDER - 19 - 4, 6), ids(BORDER - 10, 7), LONG]
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, ref, max_tokens=10)
        harness.add(10 + index, prompt, max_tokens=10)
    harness.run()
    for index, prompt in enumerate(prompts):
        assert_as_alone(harness, reference, 10 + index, prompt)
        tokens = harness.tokens[index]
        expected = torch.stack([virtual_logits(reference, prompt + tokens[:count]) for count in range(len(tokens))])
        torch.testing.assert_close(torch.stack(harness.logits[index]), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def virtual_logits(reference: Reference, token_ids: list[int]) -> torch.Tensor:
    """PEFT adds the virtual tokens, which count as positions."""
    reference.model.set_adapter("virtual")
    result: torch.Tensor = reference.model(input_ids=torch.tensor([token_ids])).logits[0, -1]
    return result


def test_scores_and_vectors(model_dir: Path, base: BaseModel) -> None:
    harness = Harness(model_dir, base, max_step_tokens=40)
    reference = Reference(model_dir, {})
    prompts = [SHORT, LONG, CROSSING, ids(BORDER + 1, 8)]
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, prompt_logprobs=0, max_tokens=0)
        harness.pool(10 + index, prompt, pooling="mean")
        harness.add(20 + index, prompt, prompt_logprobs=0, max_tokens=12)
    harness.run()
    for index, prompt in enumerate(prompts):
        expected = reference.logits(prompt, None).log_softmax(-1)
        wanted = [expected[i, prompt[i + 1]].item() for i in range(len(prompt) - 1)]
        for request_id in (index, 20 + index):
            got = [one.logprob for one in harness.prompt_logprobs[request_id]][-len(wanted) :]
            assert got == pytest.approx(wanted, abs=1e-4)
        with torch.no_grad():
            states = reference.model.base_model(input_ids=torch.tensor([prompt]))[0][0]
        torch.testing.assert_close(harness.values(10 + index), states.mean(0), atol=1e-4, rtol=0)
        assert_as_alone(harness, reference, 20 + index, prompt)


def test_packed_training_rows_have_their_own_factors(model_dir: Path, base: BaseModel) -> None:
    mapped = map_base_model(base.weights.info())
    reference = Reference(model_dir, {})
    rows = [SHORT, LONG, CROSSING, ids(BORDER, 10), ids(BORDER + 1, 11)]
    packed = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[position for row in rows for position in range(len(row))]])
    with torch.no_grad(), packed_rows([0, *itertools.accumulate(map(len, rows))]):
        logits = mapped(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
    expected = torch.cat([reference.logits(row, None) for row in rows])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_tuned_checkpoint_beside_it(model_dir: Path, base: BaseModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    model.save_pretrained(model_dir.parent / "tuned")
    harness = Harness(model_dir, base)
    ref = harness.place("tuned", [FullWeights(tensors=dict(model.named_parameters()))])
    reference = Reference(model_dir.parent / "tuned", {})
    for index, prompt in enumerate((SHORT, LONG, CROSSING)):
        harness.add(index, prompt, ref, max_tokens=12)
    harness.run()
    for index, prompt in enumerate((SHORT, LONG, CROSSING)):
        assert_as_alone(harness, reference, index, prompt)


def test_the_probe_refuses_a_base_whose_rows_take_each_others_factors(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_model, "rotate_by_length", lambda model: None)
    with pytest.raises(FailedPrecondition, match="packing sequences into one forward changes") as caught:
        load_base(str(model_dir), CPU, torch.float32, model_dir)
    assert caught.value.reason == "MODEL_UNSUPPORTED"


def test_whole_layers_computed_by_kernels_agree(tmp_path: Path) -> None:
    """In bfloat16, where the kernels compute layers of the Llama kind whole."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = LlamaConfig(
        **toys.COMMON | sizes,
        rope_parameters=longrope(16, original_max_position_embeddings=BORDER, factor=4.0),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    logits = []
    for native in (True, False):
        base = load_base(str(tmp_path / "model"), CPU, torch.bfloat16, tmp_path, native)
        harness = Harness(tmp_path / "model", base)
        for index, prompt in enumerate((SHORT, LONG, CROSSING)):
            harness.add(index, prompt, max_tokens=1)
            harness.add(10 + index, prompt, prompt_logprobs=0, max_tokens=0)
        harness.run()
        logits.append(torch.stack([harness.logits[index][0] for index in range(3)]).log_softmax(-1))
    assert (logits[0] - logits[1]).abs().mean() < 0.1


def test_dynamic_ntk_is_served_as_alone_up_to_its_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its scaling begins beyond max_position_embeddings, where the context ends; that is said."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(**toys.COMMON | {"max_position_embeddings": 96}, rope_parameters=rope)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    harness = Harness(tmp_path / "model")
    assert "dynamic" in caplog.text
    reference = Reference(tmp_path / "model", {})
    prompts = [SHORT, LONG[:84], CROSSING]
    for index, prompt in enumerate(prompts):
        harness.add(index, prompt, max_tokens=12)
    harness.run()
    for index, prompt in enumerate(prompts):
        assert_as_alone(harness, reference, index, prompt)
    # A row longer than the context, as virtual tokens may make one, changes nothing for those beside and after it.
    mapped = map_base_model(harness.base.weights.info())
    rows = [SHORT, ids(120, 12), SHORT]
    packed = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[position for row in rows for position in range(len(row))]])
    with torch.no_grad(), packed_rows([0, *itertools.accumulate(map(len, rows))]):
        logits = mapped(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(logits[-20:], reference.logits(SHORT, None), atol=1e-4, rtol=0)
