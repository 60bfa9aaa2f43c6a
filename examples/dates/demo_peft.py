"""Adapters as anyone makes them: plain PEFT, without Graftwork. Their weights are random, and so is what they say."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

MODEL_DIR = Path(str(files("graftwork_server"))) / "demo_model"
"""The small model on board, an ordinary Hugging Face model directory."""


def save_random_adapter(directory: Path, seed: int, rank: int = 16) -> None:
    """Writes a LoRA adapter of all linear layers with get_peft_model(...).save_pretrained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it is a bar of a few milliseconds for each adapter, between the demo's own lines
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:  # PEFT starts it at zero, which would change nothing
            torch.nn.init.normal_(parameter, std=0.05)
    peft_model.save_pretrained(directory)


def greedy_tokens(directory: Path, prompt_ids: list[int], count: int) -> list[int]:
    """The `count` tokens that PEFT itself continues with, the most likely one each time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, directory).eval()
    ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt_ids) :].tolist()
