"""The shared block of base weights: layout, fusion, copy-on-write mapping, refusals at load."""

from __future__ import annotations

import json
import logging
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import toys
from transformers import AutoModelForCausalLM, PhimoeConfig, Qwen2MoeConfig

from graftwork_server.base.describe import base_info
from graftwork_server.base.device import choose_device
from graftwork_server.base.weights import map_base_model
from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.attention.packed import packed_rows
from graftwork_server.layers.linear import fused_view
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base

CPU = torch.device("cpu")


def test_siblings_lie_side_by_side_and_are_computed_together(llama: BaseModel) -> None:
    fused = {tuple(name.rpartition(".")[2] for name in group.names) for group in llama.engine_model.groups}
    assert fused == {
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
        ("lm_head",),
    }
    layout = {entry.name: entry for entry in llama.weights.layout}
    q = layout["model.layers.1.self_attn.q_proj.weight"]
    k = layout["model.layers.1.self_attn.k_proj.weight"]
    assert k.offset == q.offset + 48 * 48 * 4
    assert all(entry.offset % 4 == 0 for entry in layout.values())


def test_tensors_of_different_storages_are_never_fused() -> None:
    block = torch.arange(12.0)
    assert fused_view([block[:4].view(2, 2), block[4:8].view(2, 2)]) is not None
    assert fused_view([block[:4].view(2, 2), block[6:10].view(2, 2)]) is None
    assert fused_view([torch.ones(2, 2), torch.ones(2, 2)]) is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_mapped_model_answers_like_transformers(architecture: str, tmp_path: Path) -> None:
    directory = toys.make_model(architecture, tmp_path / "model")
    base = load_base(str(directory), CPU, torch.float32, tmp_path)
    mapped = map_base_model(base.weights.info())
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = toys.prompts(3, seed=1)
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[position for row in rows for position in range(len(row))]])
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row))
    with torch.no_grad(), packed_rows(offsets):
        packed = mapped(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    with torch.no_grad():
        alone = torch.cat([reference(input_ids=torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)


def test_writing_to_a_mapped_model_does_not_reach_the_server(llama: BaseModel) -> None:
    mapped = map_base_model(llama.weights.info())
    name = "model.layers.0.mlp.down_proj.weight"
    before = llama.weights.block.clone()
    with torch.no_grad():
        dict(mapped.named_parameters())[name].fill_(7.0)
    assert torch.equal(llama.weights.block, before)
    fresh = dict(map_base_model(llama.weights.info()).named_parameters())[name]
    assert not torch.equal(fresh, torch.full_like(fresh, 7.0))


def test_the_block_is_one_file_that_both_map(llama: BaseModel) -> None:
    info = llama.weights.info()
    assert info.fd is not None
    with mmap.mmap(info.fd, info.size_bytes, access=mmap.ACCESS_READ) as view:
        assert view[: info.size_bytes] == llama.weights.block.numpy().tobytes()


def test_the_fingerprint_is_of_the_weights_not_of_the_dtype(llama_dir: Path, llama: BaseModel, tmp_path: Path) -> None:
    half = load_base(str(llama_dir), CPU, torch.bfloat16, llama_dir)
    assert half.info.fingerprint == llama.info.fingerprint
    other = load_base(str(toys.make_model("llama", tmp_path, seed=1)), CPU, torch.float32, tmp_path)
    assert other.info.fingerprint != llama.info.fingerprint


def test_base_info_names_every_linear_layer_once(llama: BaseModel) -> None:
    info = base_info(llama.engine_model.model, llama.info)
    assert info.linear_modules["model.layers.0.mlp.down_proj"] == (80, 48)
    assert info.output_module == "lm_head"
    assert len(info.linear_modules) == 3 * 7 + 1


@pytest.mark.parametrize("what", ["missing", "no-config", "bin-only", "encoder-decoder"])
def test_models_that_cannot_be_served_are_refused_in_a_sentence(what: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    if what == "no-config":
        directory.mkdir()
    if what == "bin-only":
        toys.make_model("llama", directory)
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    if what == "encoder-decoder":
        from transformers import T5Config

        T5Config().save_pretrained(directory)
    with pytest.raises(FailedPrecondition) as raised:
        load_base(str(directory), CPU, torch.float32, tmp_path)
    assert raised.value.reason in {"MODEL_UNUSABLE", "MODEL_UNSUPPORTED"}
    assert "\n" not in raised.value.message


def test_a_model_without_all_its_weights_is_refused_by_name(tmp_path: Path) -> None:
    file = toys.make_model("llama", tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        FailedPrecondition, match=r"no safetensors file has model\.layers\.1\.mlp\.down_proj\.weight"
    ) as caught:
        load_base(str(file.parent), CPU, torch.float32, tmp_path)
    assert caught.value.reason == "MODEL_UNUSABLE"


def test_what_the_files_say_and_is_not_done_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = toys.make_model("llama", tmp_path / "model")
    load_base(str(directory), CPU, torch.float32, tmp_path)
    assert caplog.text == ""
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"model.extra.weight": torch.ones(2)}, directory / "model.safetensors", {"format": "pt"})
    generation = json.loads((directory / "generation_config.json").read_text())
    generation |= {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    with caplog.at_level(logging.INFO, "graftwork.engine"):
        load_base(str(directory), CPU, torch.float32, tmp_path)
    assert "LlamaForCausalLM does not have are left out: model.extra.weight" in caplog.text
    assert "do_sample, repetition_penalty, temperature is not applied" in caplog.text


@pytest.mark.parametrize("kind", [PhimoeConfig, Qwen2MoeConfig])
def test_layers_that_see_other_tokens_than_they_tell_attention_are_refused(tmp_path: Path, kind: Any) -> None:
    """Both classes hand the window over in their masks alone. Within a context that fits the window it is none."""
    sizes = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    for window in (12, 256):
        torch.manual_seed(0)
        config = kind(**toys.COMMON, **sizes, sliding_window=window, use_sliding_window=True, max_window_layers=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(window))
    with pytest.raises(FailedPrecondition, match="a mask that is not that of sliding_window None") as caught:
        load_base(str(tmp_path / "12"), CPU, torch.float32, tmp_path)
    assert caught.value.reason == "MODEL_UNSUPPORTED"
    assert load_base(str(tmp_path / "256"), CPU, torch.float32, tmp_path).info.generates


def test_a_device_that_is_missing_is_said_so() -> None:
    if torch.cuda.is_available():
        assert choose_device("cuda").type == "cuda"
        return
    with pytest.raises(FailedPrecondition, match="CUDA"):
        choose_device("cuda")
