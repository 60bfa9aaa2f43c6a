"""Small random PEFT adapters of a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tests.toys.causal import MIXTURES, move
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification


def make_adapter(model_dir: Path, directory: Path, seed: int = 0, **config: Any) -> Path:
    """Saves a random PEFT LoRA adapter of the model's linear layers in `directory`; returns it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    # For a mixture of experts, PEFT takes "all-linear" to mean the experts' stacked parameters too.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if model.config.model_type in MIXTURES else "all-linear"
    settings = {"r": 8, "lora_alpha": 16, "target_modules": targets, "task_type": "CAUSAL_LM"} | config
    peft_model = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft_model.save_pretrained(directory)
    return directory


def make_peft(model_dir: Path, directory: Path, config: PeftConfig, seed: int = 0) -> Path:
    """Saves a PEFT adapter of the model, every trained parameter moved a little, in `directory`; returns it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of each tied weight
        peft_model = get_peft_model(model, config)
        move(peft_model, only_trained=True, seed=seed)
        peft_model.save_pretrained(directory)
    return directory


def make_all(model_dir: Path, directory: Path, configs: Mapping[str, PeftConfig]) -> dict[str, Path]:
    """An adapter of each configuration, with weights of its own, in folders of `directory`; by the same names."""
    directory.mkdir(parents=True, exist_ok=True)
    return {
        name: make_peft(model_dir, directory / str(seed), config, seed=seed)
        for seed, (name, config) in enumerate(configs.items())
    }


def make_classifier(model_dir: Path, directory: Path, labels: int = 3, seed: int = 0, **config: Any) -> Path:
    """Saves a random PEFT adapter of task_type SEQ_CLS for the model, its head with it, in `directory`; returns it."""
    return _make_other_task(AutoModelForSequenceClassification, model_dir, directory, labels, seed, "SEQ_CLS", config)


def make_embedder(model_dir: Path, directory: Path, seed: int = 0, **config: Any) -> Path:
    """Saves a random PEFT adapter of task_type FEATURE_EXTRACTION for the model in `directory`; returns it."""
    return _make_other_task(AutoModel, model_dir, directory, 2, seed, "FEATURE_EXTRACTION", config)


def _make_other_task(
    kind: Any, model_dir: Path, directory: Path, labels: int, seed: int, task: str, config: dict[str, Any]
) -> Path:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(model_dir, dtype=torch.float32, num_labels=labels, ignore_mismatched_sizes=True)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task} | config
        peft_model = get_peft_model(model, LoraConfig(**copy.deepcopy(settings)))  # PEFT adds to modules_to_save
        move(peft_model, only_trained=True, seed=seed)
        peft_model.save_pretrained(directory)
    return directory
