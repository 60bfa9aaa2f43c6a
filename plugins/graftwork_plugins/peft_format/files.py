"""PEFT's two files: adapter_config.json and adapter_model.safetensors, read and written."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from graftwork_plugins import Artifact, ArtifactError, SavedArtifact, all_finite, without_derived

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""
BASE_LAYER = ".base_layer"
"""What PEFT puts behind the name of a module that it has wrapped, for the base's own parameters and for what it wraps
around them a second time."""


def artifact_files(peft_types: str) -> str:
    """What a strategy for these peft_types recognises, in words."""
    return f"{CONFIG_FILE} with peft_type {peft_types} and {WEIGHTS_FILE}, as PEFT's save_pretrained writes them"


def peft_type(artifact: Artifact) -> str | None:
    """The artifact's peft_type; None if it is none of PEFT's. Raises ArtifactError if its configuration is damaged."""
    if CONFIG_FILE not in artifact.names():
        return None
    kind = artifact.json(CONFIG_FILE).get("peft_type")
    return kind if isinstance(kind, str) else None


_IN_MODEL = re.compile(r"\.(lora_[A-Za-z_]+|ia3_l)\.default(?=\.|$)")
"""What PEFT's names have while the adapter is in a model, and scripts save that write a model's state as it is."""


def read_tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's file by the names that save_pretrained gives them, less what transformers derives itself.

    Raises ArtifactError.
    """
    names = artifact.names()
    if WEIGHTS_FILE not in names and "adapter_model.bin" in names:
        raise ArtifactError(
            "adapter_model.bin",
            f"adapter_model.bin is a pickle, which is never read; save the adapter as {WEIGHTS_FILE} "
            "(save_pretrained with safe_serialization=True)",
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in without_derived(artifact.tensors(WEIGHTS_FILE)).items():
        saved_as = _IN_MODEL.sub(r".\1", name)
        if saved_as.endswith(".lora_magnitude_vector.weight"):
            saved_as = saved_as.removesuffix(".weight")
        if saved_as in tensors:
            raise ArtifactError(name, f"{WEIGHTS_FILE} has {saved_as} twice: with and without the adapter's name in it")
        tensors[saved_as] = tensor
    return tensors


def saved_by_peft(model: Any) -> SavedArtifact:
    """What PEFT's save_pretrained writes for the adapter of a PeftModel."""
    import peft

    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    document = model.peft_config["default"].to_dict()
    document |= {"inference_mode": True, "base_model_name_or_path": None}
    return SavedArtifact(
        tensors={WEIGHTS_FILE: tensors}, documents={CONFIG_FILE: json.loads(json.dumps(document, default=_plain))}
    )


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raises ArtifactError unless the values are floating point."""
    if not tensor.is_floating_point():
        raise ArtifactError(name, f"tensor {name} is {tensor.dtype}; float32, bfloat16 and float16 are accepted")


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Raises ArtifactError unless the values are floating point and finite."""
    check_dtype(name, tensor)
    if not all_finite(tensor):
        raise ArtifactError(name, f"tensor {name} has values that are not finite")


def unsupported(name: str, accepted: str) -> ArtifactError:
    """The error for a tensor that no rule knows."""
    is_parameter = name.endswith((".weight", ".bias")) and "lora_" not in name
    why = "the base has no such parameter; " if is_parameter else ""
    return ArtifactError(name, f"tensor {name} is not supported: {why}{accepted}")


def _plain(value: Any) -> Any:
    """PEFT keeps sets and enumerations in its configuration."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
