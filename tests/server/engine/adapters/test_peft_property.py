"""Random adapters of every kind in random courses of requests: what is served is what PEFT computes.

A course has requests that come in different steps, share beginnings, are computed in chunks, preempted for want of
cache blocks, and wait for adapters that others evict. GRAFTWORK_EXAMPLES=500 draws as many other ones.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from tests import toys
from tests.server.engine.adapters.test_peft_features import load
from tests.server.engine.harness import CPU, Harness, StepLoader
from transformers import AutoModelForCausalLM

from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base
from graftwork_server.types import AdapterRef

EXAMPLES = int(os.environ.get("GRAFTWORK_EXAMPLES", "0"))

_QKV, _MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
LINEARS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    **{name: [*_QKV, *_MLP] for name in ("llama", "qwen2", "qwen3", "mistral", "gemma3")},
    **dict.fromkeys(toys.MIXTURES, _QKV),
}
WHOLE = {
    "gpt2": ["ln_f", "ln_1", "wte", "wpe", "h.0.mlp"],
    "phi3": ["norm", "embed_tokens", "lm_head", "layers.1.mlp", "o_proj"],
    "llama": ["norm", "embed_tokens", "lm_head", "layers.0.mlp", "k_proj"],
    "gemma3": ["q_norm", "embed_tokens", "lm_head", "pre_feedforward_layernorm", "up_proj"],
    **{name: ["norm", "input_layernorm", "embed_tokens", "layers.2.self_attn"] for name in ("qwen2", "qwen3")},
    **{name: ["model.norm", "embed_tokens", "lm_head", "v_proj"] for name in ("mistral", *toys.MIXTURES)},
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "layers.2.mlp.gate.weight"]
TIED = ("llama", "gemma3", "gpt2")
BEGINNINGS = [list(range(20, 53)), [*range(20, 36), *range(60, 80)], list(range(20, 36)) * 3, []]
"""Of prompts: two and three blocks or a little more, the first block the same; or nothing."""


@st.composite
def lora(draw: st.DrawFn, architecture: str) -> PeftConfig:
    """What PEFT takes, all of it within what is served."""
    embedding = "wte" if architecture == "gpt2" else "embed_tokens"
    layers = [*LINEARS[architecture], "lm_head", embedding]
    targets = draw(st.lists(st.sampled_from(layers), min_size=1, max_size=4, unique=True))
    whole = draw(st.lists(st.sampled_from(WHOLE[architecture]), max_size=2, unique=True))
    dora = draw(st.booleans())
    rank = draw(st.integers(1, 16) | st.integers(17, 512))
    rslora = draw(st.booleans())
    # However large the rank, updates are about as large as what they are added to.
    alpha = draw(st.sampled_from([0.5, 1, 2])) * (1 if rslora else rank**0.5)
    result: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": targets,
        "modules_to_save": [name for name in whole if name not in targets] or None,
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "lora_bias": not dora and embedding not in targets and draw(st.booleans()),
        "rank_pattern": {targets[0]: draw(st.integers(max(1, rank // 2), min(512, 2 * rank)))}
        if draw(st.booleans())
        else {},
        "alpha_pattern": {rf"[01]\..*{targets[-1]}": alpha / 2} if draw(st.booleans()) else {},
        "layers_to_transform": draw(st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True)),
        "exclude_modules": draw(st.none() | st.just(rf".*[hs]\.1\..*{targets[0]}")),
        # PEFT drops what it has tied to GPT-2's embedding when it loads, so that is refused by name.
        "ensure_weight_tying": draw(st.booleans()) and architecture != "gpt2",
        "task_type": "CAUSAL_LM",
    }
    # Rows of a module that has an update or weights of its own are refused by name.
    taken = {embedding, "lm_head"} if architecture in TIED else {embedding}
    if draw(st.booleans()) and not taken & {*whole, *targets}:
        result["trainable_token_indices"] = draw(st.lists(st.integers(0, 159), min_size=1, max_size=9, unique=True))
    if architecture in toys.MIXTURES and draw(st.booleans()):
        result["target_parameters"] = draw(st.lists(st.sampled_from(EXPERTS), min_size=1, unique=True))
        result |= {"use_dora": False, "lora_bias": False, "modules_to_save": None, "rank_pattern": {}}
    return LoraConfig(**result)


@st.composite
def ia3(draw: st.DrawFn, architecture: str) -> PeftConfig:
    layers = [*LINEARS[architecture], "lm_head"]
    targets = draw(st.lists(st.sampled_from(layers), min_size=1, max_size=4, unique=True))
    whole = draw(st.lists(st.sampled_from(WHOLE[architecture]), max_size=1))
    inputs = draw(st.lists(st.sampled_from(targets), unique=True))
    kept = [name for name in whole if name not in targets] or None
    return IA3Config(target_modules=targets, feedforward_modules=inputs, modules_to_save=kept, task_type="CAUSAL_LM")


@st.composite
def virtual(draw: st.DrawFn, architecture: str) -> PeftConfig:
    kind = draw(st.sampled_from([PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig]))
    inner = {} if kind is PromptTuningConfig else {"encoder_hidden_size": 16}
    if kind is PrefixTuningConfig:
        inner["prefix_projection"] = draw(st.booleans())
    return kind(num_virtual_tokens=draw(st.integers(1, 20)), task_type="CAUSAL_LM", **inner)


@dataclass(frozen=True)
class Row:
    """A request."""

    adapter: int
    """Its number; 0 is the base."""
    prompt: list[int]
    max_tokens: int
    step: int
    """When it comes."""
    scored: bool
    salt: str
    priority: int


@dataclass(frozen=True)
class Course:
    """Everything of an example."""

    architecture: str
    native: bool
    adapters: list[PeftConfig]
    rows: list[Row]
    limits: dict[str, int]
    blocks: int
    """Of the KV cache."""
    room: float
    """Of the adapter pool, in largest adapters."""


@st.composite
def courses(draw: st.DrawFn) -> Course:
    architecture = draw(st.sampled_from(sorted(LINEARS)))
    kinds = lora(architecture) | lora(architecture) | lora(architecture) | ia3(architecture) | virtual(architecture)
    adapters = draw(st.lists(kinds, min_size=1, max_size=4))
    beginning = st.sampled_from(BEGINNINGS)
    row = st.builds(
        Row,
        adapter=st.integers(0, len(adapters)),
        prompt=st.builds(lambda a, b: [*a, *b], beginning, st.lists(st.integers(0, 159), min_size=1, max_size=9)),
        max_tokens=st.integers(1, 30),
        step=st.integers(0, 9),
        scored=st.booleans(),
        salt=st.sampled_from(["", "", "s"]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
    )
    return Course(
        architecture,
        draw(st.booleans()),
        adapters,
        draw(st.lists(row, min_size=5, max_size=10)),
        {
            "max_step_tokens": draw(st.sampled_from([9, 40, 200])),
            "max_sequences": draw(st.integers(2, 8)),
            "prefix_cache": draw(st.sampled_from([True, True, True, False])),
        },
        draw(st.sampled_from([7, 8, 9, 100])),
        draw(st.sampled_from([1, 1.5, 100])),
    )


Base = Callable[[str, bool], BaseModel]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """By architecture, with the kernels or without."""
    folder = tmp_path_factory.mktemp("bases")
    loaded: dict[tuple[str, bool], BaseModel] = {}

    def base(architecture: str, native: bool) -> BaseModel:
        directory = folder / architecture
        if not directory.exists():
            toys.make_model(architecture, directory)
        if (architecture, native) not in loaded:
            loaded[architecture, native] = load_base(str(directory), CPU, torch.float32, directory, native=native)
        return loaded[architecture, native]

    return base


def saved(source: Path, folder: Path, configs: list[PeftConfig]) -> dict[int, tuple[Path, Any]]:
    """By number, the adapters that PEFT itself takes: the directory and PEFT's model of it."""
    result = {}
    for number, config in enumerate(configs, 1):
        try:
            path = toys.make_peft(source, folder / str(number), copy.deepcopy(config), seed=number)
            plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            result[number] = path, PeftModel.from_pretrained(plain, path).eval()
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            event(f"PEFT: {error}"[:60])
    return result


def check(harness: Harness, index: int, row: Row, model: Any) -> None:
    """Logits and greedy tokens of a request that has ended, and its prompt's log probabilities."""
    tokens = harness.tokens[index]
    assert len(tokens) == len(harness.logits[index]) == row.max_tokens
    ids = row.prompt + tokens
    with torch.no_grad():
        of_peft = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
    expected = of_peft[len(row.prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack(harness.logits[index]), expected, atol=1e-4, rtol=1e-5)
    assert tokens == expected.argmax(-1).tolist()
    if row.scored:
        scored = [entry.logprob for entry in harness.prompt_logprobs[index]]
        logprobs = of_peft.log_softmax(-1)[range(len(row.prompt) - 1), row.prompt[1:]]
        assert scored[0] is None
        torch.testing.assert_close(torch.tensor(scored[1:]), logprobs, atol=1e-4, rtol=1e-5)


@settings(
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes many minutes; the cases are readable
)
@given(course=courses())
def test_what_is_served_is_what_peft_computes(base_of: Base, course: Course) -> None:
    base = base_of(course.architecture, course.native)
    source = Path(base.info.source)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters = saved(source, Path(folder), course.adapters)
        deltas = {number: load(path, base) for number, (path, _) in adapters.items()}
    prepared = {str(number): bind(base, str(number), made) for number, made in deltas.items()}
    refs = {number: AdapterRef(digest=str(number), path="", strategy="lora") for number in adapters}
    models = {number: model for number, (_, model) in adapters.items()}
    models[0] = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    largest = max((one.device_bytes for one in prepared.values()), default=1)
    block_bytes = BLOCK_TOKENS * sum(shape.bytes_per_token(base.dtype) for shape in base.layer_shapes)
    harness = Harness(
        source,
        base,
        kv_memory_bytes=course.blocks * block_bytes,
        adapter_memory_bytes=int(course.room * largest),
        **course.limits,
    )
    loader = StepLoader(harness, prepared)
    preempted: list[int] = []

    def run(rows: dict[int, Row]) -> None:
        arrivals, now = dict(rows), 0
        while arrivals or harness.engine.active:
            for index in [index for index, row in arrivals.items() if row.step <= now]:
                row = arrivals.pop(index)
                harness.add(
                    index,
                    row.prompt,
                    refs.get(row.adapter),
                    0 if row.scored else None,
                    max_tokens=row.max_tokens,
                    cache_salt=row.salt,
                    priority=row.priority,
                )
            loader.load()
            harness.step()
            if harness.engine._admission._preempted:
                preempted.append(now)
            now += 1
            assert now < 3000, "somebody starves"

    run(dict(enumerate(course.rows)))
    for index, row in enumerate(course.rows):
        check(harness, index, row, models[row.adapter if row.adapter in adapters else 0])
    pool = harness.engine.adapters
    assert harness.engine.blocks.free_blocks == harness.engine.blocks.num_blocks
    assert all(record.leases == 0 for record in pool._loaded())
    event(f"evictions: {len(loader.loads) > len({row.adapter for row in course.rows} & adapters.keys())}")
    event(f"found in the cache: {any(harness.cached.values())}")
    event(f"preempted: {bool(preempted)}")

    for digest in pool.digests():
        pool.unload(digest)
    assert pool.used_bytes == 0
    run({100: course.rows[-1]})  # alone, and loaded again
    assert harness.tokens[100] == harness.tokens[len(course.rows) - 1]
