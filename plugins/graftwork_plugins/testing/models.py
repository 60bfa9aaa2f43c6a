"""Small random models, and a model as a strategy gets it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from graftwork_plugins import BaseInfo, BaseModelHandle

CPU = torch.device("cpu")
_PROBE = [[5, 9, 2, 40, 7, 1, 33], [8, 3, 3, 21]]


def make_model(**sizes: Any) -> torch.nn.Module:
    """A random Llama in float32, frozen, in evaluation mode; the same one for the same sizes."""
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LlamaForCausalLM(LlamaConfig(**settings | sizes)).eval().requires_grad_(False)


def base_handle(model: torch.nn.Module, quantization: str = "none") -> BaseModelHandle:
    """`model` as a strategy gets it. `quantization`: what the base says of its linear layers."""
    any_model: Any = model
    output = any_model.get_output_embeddings()
    embedding = any_model.get_input_embeddings()
    linear: dict[str, tuple[int, int]] = {}
    embeddings: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            linear[name] = (module.weight.shape[0], module.weight.shape[1])
        elif isinstance(module, torch.nn.Linear):
            linear[name] = (module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Embedding):
            embeddings[name] = (module.num_embeddings, module.embedding_dim)
    names = {module: name for name, module in model.named_modules()}
    tied = [
        n for n, m in model.named_modules() if getattr(m, "weight", None) is embedding.weight and m is not embedding
    ]
    parameters = list(model.parameters())
    info = BaseInfo(
        fingerprint="sha256:kit",
        architecture=type(model).__name__,
        config=any_model.config.to_dict(),
        linear_modules=linear,
        output_module=names.get(output),
        parameter_count=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        embedding_modules=embeddings,
        input_module=names[embedding],
        tied_modules=tied,
        parameters={n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)},
        quantization=quantization,
    )
    return BaseModelHandle(info, model, CPU)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits of two short prompts, one after another: [tokens, vocabulary]. Dropout is off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in _PROBE]
    for module in training:
        module.training = True
    return torch.cat(logits)
