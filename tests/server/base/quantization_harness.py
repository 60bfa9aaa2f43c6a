"""What the tests of quantised bases share: the model that the codes stand for, as transformers and PEFT compute it.

nf4 multiplies with the dequantised weights: the usual bound of 1e-4. int8 rounds the inputs of each layer as well; its
bounds are of tests/toys' random models, whose weights are ten times larger than trained ones and amplify it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tests.server.engine.harness import CPU
from transformers import AutoModelForCausalLM

from graftwork_server.base.quantization import QuantizedLinear
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.causal import load_base

KINDS = ("nf4", "int8")
INT8_MOST, INT8_MEAN = 0.5, 0.06
"""Bounds of int8's logits, of their standard deviation: the largest difference, and the mean one."""


def quantised(model_dir: Path, kind: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    return load_base(str(model_dir), CPU, dtype, model_dir, quantization=kind)


def layers(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    """Quantised layers by their names in the plain model."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    return {name.removesuffix(".base"): module for name, module in found.items()}


def dequantised(base: BaseModel) -> Any:
    """transformers' own model, with the weights that the base's layers stand for."""
    model = AutoModelForCausalLM.from_pretrained(base.info.source, dtype=torch.float32).eval()
    for name, layer in layers(base.engine_model.model).items():
        weight = layer.dequantized(torch.float32)
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(weight.t() if layer.is_conv1d else weight)
    return model


def reference_logits(base: BaseModel, artifact: Path | None, row: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] of the dequantised model with an adapter, by PEFT."""
    model = dequantised(base)
    if artifact is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, artifact).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([row])).logits[0]
    return logits


def assert_within_bounds(base: BaseModel, logits: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    difference = (logits - expected).abs()
    if base.info.quantization == "nf4":
        assert difference.max() < 1e-4, f"{what}: {difference.max()}"
        return
    spread = expected.std()
    assert difference.max() < INT8_MOST * spread, f"{what}: {difference.max() / spread} of the spread"
    assert difference.mean() < INT8_MEAN * spread, f"{what}: {difference.mean() / spread} of the spread"
