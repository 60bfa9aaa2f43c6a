"""What the base model is: the facts that the front, strategies and manifests need, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from graftwork_plugins import BaseInfo
from graftwork_server.base.quantization import QuantizedLinear
from graftwork_server.types import ModelInfo

_SAMPLE_VALUES = 32 * 1024
"""Values of each tensor that take part in the fingerprint: half from its start, half from its end."""


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Linear layers by dotted name, as (in_features, out_features). Layers the engine wrapped count as themselves."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if name.endswith(".base"):
            continue
        if isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[0], module.weight.shape[1])
        elif hasattr(module, "in_features") and hasattr(module, "out_features"):
            shapes[name] = (int(module.in_features), int(module.out_features))
    return shapes


def embedding_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Embeddings by dotted name, as (number of embeddings, size of one)."""
    return {
        name: (module.num_embeddings, module.embedding_dim)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }


def tied_modules(model: torch.nn.Module) -> list[str]:
    """Modules whose weight is the input embedding's own."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if module is not embedding
        and not name.endswith(".base")
        and getattr(module, "weight", None) is not None
        and module.weight is embedding.weight
    ]


def parameter_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by their names in the plain transformers model, tied ones under each name."""
    shapes = {
        plain_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            layer = name.removesuffix(".base")
            del shapes[f"{layer}.{module.STATISTICS}"]
            shapes |= {f"{layer}.{leaf}": shape for leaf, shape in module.plain_shapes.items()}
    return shapes


def plain_name(name: str) -> str:
    """A parameter's name without the wrapper's level: "q_proj.base.weight" -> "q_proj.weight"."""
    head, _, leaf = name.rpartition(".")
    return f"{head.removesuffix('.base')}.{leaf}"


def output_module_name(model: torch.nn.Module) -> str | None:
    """Dotted name of the layer that makes the logits."""
    return _name_of(model, model.get_output_embeddings())  # type: ignore[operator]


def _name_of(model: torch.nn.Module, wanted: torch.nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def base_info(model: torch.nn.Module, model_info: ModelInfo) -> BaseInfo:
    """The base as strategies see it."""
    trunk_name = str(model.base_model_prefix)
    return BaseInfo(
        fingerprint=model_info.fingerprint,
        architecture=model_info.architecture,
        config=model.config.to_dict(),  # type: ignore[operator, union-attr]
        linear_modules=linear_shapes(model),
        output_module=output_module_name(model),
        parameter_count=model_info.parameter_count,
        weight_bytes=model_info.weight_bytes,
        dtype=model_info.dtype,
        embedding_modules=embedding_shapes(model),
        input_module=_name_of(model, model.get_input_embeddings()),  # type: ignore[operator]
        tied_modules=tied_modules(model),
        parameters=parameter_shapes(model),
        quantization=model_info.quantization,
        trunk=trunk_name if hasattr(model, trunk_name) else "",
        trunk_name=trunk_name,
    )


def fingerprint(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over the architecture's configuration and over every tensor's name, shape and a sample of its values.

    Values are rounded to bfloat16 first, so that the same checkpoint has the same fingerprint in whatever dtype it is
    served.
    """
    volatile = {"transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in volatile and not key.startswith("_")}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        digest.update(f"{name}|{list(tensors[name].shape)}|".encode())
        for sample in (flat[: _SAMPLE_VALUES // 2], flat[-_SAMPLE_VALUES // 2 :]):
            digest.update(sample.to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
