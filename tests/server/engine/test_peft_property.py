"""Random LoRA configurations in random mixed batches: what is served is what PEFT computes."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from tests import toys
from tests.server.engine.harness import CPU, Harness
from transformers import AutoModelForCausalLM

from graftwork_plugins import Artifact
from graftwork_plugins.builtin.lora import Lora
from graftwork_server.engine.describe import base_info
from graftwork_server.engine.model import BaseModel, load_base

LAYERS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head", "wte"],
}
WHOLE = {
    "llama": ["norm", "embed_tokens", "lm_head", "layers.0.mlp", "k_proj"],
    "qwen2": ["norm", "input_layernorm", "embed_tokens", "lm_head", "layers.2.self_attn"],
    "gpt2": ["ln_f", "ln_1", "wte", "wpe", "h.0.mlp"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: load_base(str(toys.make_model(name, folder / name)), CPU, torch.float32, folder / name) for name in LAYERS
    }


@st.composite
def lora_settings(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    """LoraConfig settings that PEFT takes for the architecture."""
    layers = LAYERS[architecture]
    targets = draw(st.lists(st.sampled_from(layers), min_size=1, max_size=4, unique=True))
    whole = draw(st.lists(st.sampled_from(WHOLE[architecture]), max_size=2, unique=True))
    dora = draw(st.booleans())
    rank = draw(st.sampled_from([1, 2, 5, 8, 33]))
    result: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank * draw(st.sampled_from([0.5, 1, 2])),
        "use_rslora": draw(st.booleans()) and rank <= 8,
        "use_dora": dora,
        "target_modules": targets,
        "modules_to_save": [name for name in whole if name not in targets] or None,
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "lora_bias": not dora and not {"wte", "embed_tokens"} & set(targets) and draw(st.booleans()),
        "rank_pattern": {targets[0]: draw(st.integers(1, 9))} if draw(st.booleans()) else {},
        "layers_to_transform": draw(st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True)),
        # PEFT drops what it has tied to GPT-2's embedding when it loads, so that is refused by name.
        "ensure_weight_tying": draw(st.booleans()) and architecture != "gpt2",
        "task_type": "CAUSAL_LM",
    }
    # Rows of a module that has an update or weights of its own are refused by name.
    taken = {"wte", "embed_tokens"} if architecture == "qwen2" else {"wte", "embed_tokens", "lm_head"}
    if draw(st.booleans()) and not taken & {*whole, *targets}:
        result["trainable_token_indices"] = draw(st.lists(st.integers(0, 159), min_size=1, max_size=9, unique=True))
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]], list[tuple[int, list[int]]], int]:
    """Architecture, adapters' settings, rows as (number of the adapter, 0 for the base; prompt), tokens in a step."""
    architecture = draw(st.sampled_from(sorted(LAYERS)))
    adapters = draw(st.lists(lora_settings(architecture), min_size=1, max_size=3))
    prompt = st.lists(st.integers(0, 159), min_size=1, max_size=20)
    rows = draw(st.lists(st.tuples(st.integers(0, len(adapters)), prompt), min_size=1, max_size=7))
    return architecture, adapters, rows, draw(st.sampled_from([9, 40, 200]))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes many minutes; the cases are readable
)
@given(case=cases())
def test_what_is_served_is_what_peft_computes(
    bases: dict[str, BaseModel], case: tuple[str, list[dict[str, Any]], list[tuple[int, list[int]]], int]
) -> None:
    architecture, adapters, rows, step_tokens = case
    base = bases[architecture]
    source = Path(base.info.source)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = []
        for number, config in enumerate(adapters):
            try:
                paths.append(toys.make_peft(source, Path(folder) / str(number), LoraConfig(**config), seed=number))
                PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), paths[-1])
            except (ValueError, TypeError, RuntimeError, KeyError, AttributeError):
                reject()  # PEFT itself does not take this combination
        harness = Harness(source, base, max_step_tokens=step_tokens)
        info = base_info(base.engine_model.model, base.info)
        refs: list[Any] = [None]
        refs += [harness.place(str(path), Lora().load(Artifact(path), info)) for path in paths]
        for index, (number, prompt) in enumerate(rows):
            harness.add(index, prompt, refs[number], max_tokens=3)
        harness.run()
        for number, path in enumerate([None, *paths]):
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            if path is not None:
                model = PeftModel.from_pretrained(model, path)
            model.eval()
            for index, (of_adapter, prompt) in enumerate(rows):
                if of_adapter != number:
                    continue
                tokens = harness.tokens[index]
                with torch.no_grad():
                    expected = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
                torch.testing.assert_close(torch.stack(harness.logits[index]), expected, atol=1e-4, rtol=1e-5)
                assert tokens == expected.argmax(-1).tolist()
