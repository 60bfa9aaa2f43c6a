"""Jobs on a quantised base: trained on the engine's own codes, through the dequantised weights, or refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.server.tuning.tuner.tuner_harness import TunerHarness, losses
from transformers import AutoModelForCausalLM

from graftwork_plugins import DeviceInfo, UnsupportedBase
from graftwork_plugins.builtin.strategies.qlora import Qlora, QloraConfig
from graftwork_server.base.describe import base_info
from graftwork_server.base.quantization import QuantizedLinear
from graftwork_server.errors import FailedPrecondition
from graftwork_server.tuning.plugin_host import PluginHost
from graftwork_server.wire.tuning import Finished, PreparedJob

SETTINGS: dict[str, Any] = {"max_steps": 20, "batch_size": 16, "learning_rate": 0.01, "r": 8, "lora_alpha": 16}


@pytest.fixture(scope="module", params=["nf4", "int8"])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TunerHarness:
    return TunerHarness(tmp_path_factory.mktemp(request.param), quantization=request.param)


@pytest.fixture(scope="module")
def dequantised(harness: TunerHarness, tmp_path_factory: pytest.TempPathFactory) -> TunerHarness:
    """The same base with plain weights, those that the quantised ones stand for."""
    folder = tmp_path_factory.mktemp("dequantised")
    model: Any = AutoModelForCausalLM.from_pretrained(harness.model_dir, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in harness.model.named_modules():
            if isinstance(layer, QuantizedLinear):
                model.get_submodule(name).weight.copy_(layer.dequantized(torch.float32))
    model.save_pretrained(folder / "model")
    return TunerHarness(folder, model_dir=folder / "model")


def prepared(harness: TunerHarness, strategy: str, **config: Any) -> PreparedJob:
    device = DeviceInfo(type="cpu", total_memory_bytes=1 << 33, threads=1)
    return PluginHost().prepare_job(strategy, config, 10, 100, base_info(harness.model, harness.info), device)


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
def test_a_job_learns_as_on_the_dequantised_base(
    strategy: str, harness: TunerHarness, dequantised: TunerHarness
) -> None:
    before = harness.weights.block.clone()
    settings = SETTINGS | ({"lora_dropout": 0.0, "max_grad_norm": 1.0} if strategy == "qlora" else {})
    job = harness.job(strategy, strategy=strategy, **settings)
    events = harness.run_here(job)
    assert isinstance(events[-1], Finished), events[-1]
    assert losses(events)[-1] < 0.5 * losses(events)[0]
    assert torch.equal(harness.weights.block, before)

    theirs = dequantised.run_here(dequantised.job(strategy, strategy="lora", **SETTINGS))
    assert losses(events) == pytest.approx(losses(theirs), rel=1e-3)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(harness.model_dir), job.artifact_dir)


def test_ia3_trains_on_codes_too(harness: TunerHarness, dequantised: TunerHarness) -> None:
    settings: dict[str, Any] = {"strategy": "ia3", "max_steps": 6, "batch_size": 16, "learning_rate": 0.1}
    events = harness.run_here(harness.job("ia3", **settings))
    assert isinstance(events[-1], Finished), events[-1]
    assert losses(events)[-1] < losses(events)[0]
    theirs = dequantised.run_here(dequantised.job("ia3", **settings))
    assert losses(events) == pytest.approx(losses(theirs), rel=1e-3)


def test_a_tuner_in_a_process_of_its_own_maps_the_codes(harness: TunerHarness) -> None:
    job = harness.job("own-process", **SETTINGS | {"max_steps": 3})
    events = harness.run(job)
    assert isinstance(events[-1], Finished), events[-1]
    assert Path(job.artifact_dir, "adapter_model.safetensors").is_file()


def test_full_is_refused_before_it_trains(harness: TunerHarness) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        prepared(harness, "full")
    assert raised.value.reason == "NOT_TRAINABLE"
    assert harness.info.quantization in raised.value.message
    assert "--quantization none" in raised.value.message


def test_lora_knows_that_one_layer_is_dequantised_at_a_time(harness: TunerHarness, dequantised: TunerHarness) -> None:
    mine, theirs = prepared(harness, "lora"), prepared(dequantised, "lora")
    assert mine.estimate.trained_parameters == theirs.estimate.trained_parameters
    largest = 80 * 48  # as many as the vocabulary's 160 * 48 at most
    assert mine.estimate.memory_bytes - theirs.estimate.memory_bytes >= 4 * largest


def test_qlora_wants_a_quantised_base(harness: TunerHarness, dequantised: TunerHarness) -> None:
    Qlora().validate(QloraConfig(), base_info(harness.model, harness.info))
    with pytest.raises(UnsupportedBase, match="--quantization nf4"):
        Qlora().validate(QloraConfig(), base_info(dequantised.model, dequantised.info))
