"""load.py: which models are no base, what an encoder does not take, and how each pools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import toys
from tests.server.engine.harness import CPU
from tests.server.layers.models.encoder_harness import harness_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from graftwork_plugins import FullWeights, Prefix
from graftwork_server.errors import FailedPrecondition
from graftwork_server.layers.binding.adapter import bind
from graftwork_server.layers.models.load import load_model


def test_what_an_encoder_does_not_take_is_refused(tmp_path: Path) -> None:
    model_dir = toys.make_encoder("bert", tmp_path / "model")
    harness = harness_of(model_dir)
    for delta in (FullWeights(tensors={}), Prefix(embeddings=torch.ones(2, 48))):
        with pytest.raises(FailedPrecondition, match="an encoder takes deltas of modules and heads"):
            bind(harness.base, "wrong", [delta])
    harness.pool(1, [2, 3], kind="classify")
    error = harness.finished[1].error
    assert error is not None
    assert error.reason == "HEAD_MISSING"
    assert "ForSequenceClassification" in error.message


def test_a_decoders_classifier_is_no_base(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(toys.CONFIGS["llama"])
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FailedPrecondition, match=r"LlamaForSequenceClassification.*as an adapter"):
        load_model(str(tmp_path / "model"), CPU, torch.float32, tmp_path)


def test_the_default_pooling_is_the_checkpoints_own(tmp_path: Path) -> None:
    model_dir = toys.make_encoder("distilbert", tmp_path / "model")
    info = load_model(str(model_dir), CPU, torch.float32, tmp_path).info
    assert (info.default_pooling, info.undone_pooling, info.hidden_size, info.kv_tokens) == ("mean", "", 48, 0)
    (model_dir / "1_Pooling").mkdir()
    (model_dir / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    info = load_model(str(model_dir), CPU, torch.float32, tmp_path).info
    assert (info.default_pooling, info.undone_pooling) == ("cls", "")


def test_a_causal_base_pools_the_last_token(llama_dir: Path) -> None:
    info = load_model(str(llama_dir), CPU, torch.float32, llama_dir).info
    assert (info.default_pooling, info.hidden_size, info.generates) == ("last", 48, True)
    assert AutoModelForCausalLM.from_pretrained(llama_dir).config.hidden_size == 48
