"""Full tuning: every weight of the base, trained in the tuner's own float32 copy.

What comes out is a Hugging Face checkpoint (config.json and model.safetensors, in the base's dtype).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from graftwork_plugins import (
    Artifact,
    ArtifactError,
    BaseInfo,
    BaseModelHandle,
    DatasetInfo,
    DeviceInfo,
    Estimate,
    FullWeights,
    PackedBatch,
    SavedArtifact,
    Strategy,
    Trainable,
    TrainingConfig,
    UnsupportedBase,
    hookimpl,
)
from graftwork_plugins.automatic import FULL_RATE, FULL_WIDTH, Automatic, Choice, full_rate, model_width
from graftwork_plugins.estimates import activation_bytes

if TYPE_CHECKING:
    import torch

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

_DESCRIPTIVE = frozenset(
    """
    architectures transformers_version torch_dtype dtype use_cache return_dict output_attentions
    output_hidden_states chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type
    bos_token_id eos_token_id pad_token_id cls_token_id sep_token_id decoder_start_token_id attention_dropout
    attn_pdrop embd_pdrop resid_pdrop hidden_dropout dropout initializer_range tokenizer_class max_length
    do_sample temperature top_p top_k num_beams pretraining_tp attn_implementation experts_implementation
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj n_ctx
    task_specific_params gradient_checkpointing
    """.split()  # noqa: SIM905 - one name a line would fill a page
)
"""Keys of config.json that change nothing in the forward."""

_DERIVED = frozenset({"head_dim", "num_key_value_heads", "n_inner"})
"""Keys for which null means: as the other sizes say. The tensors' shapes decide."""


def _rate(config: FullConfig, base: BaseInfo) -> Choice:
    rate = float(f"{full_rate(base):.2g}")
    return Choice(
        rate,
        f"{FULL_RATE:g} is usual at width {FULL_WIDTH}, and the best rate falls as width rises: {model_width(base)}",
    )


class FullConfig(TrainingConfig):
    """Settings of full tuning."""

    learning_rate: Annotated[float, Automatic(_rate)] = Field(
        5e-5, gt=0, le=10, description="Peak learning rate of AdamW; left open: by the model's width."
    )


@dataclass
class _Copy(Trainable):
    """The copy, and what it is to be saved as."""

    save_dtype: str = "float32"


class FullTuning(Strategy):
    """Trains a copy of all weights; served as a whole checkpoint beside the base."""

    id = "full"
    version = "1.0"
    description = "Full tuning: every weight, in an own copy; a whole checkpoint that is served beside the base."
    artifact_files = "config.json and model.safetensors, a Hugging Face checkpoint of the base's architecture"
    Config = FullConfig

    def validate(self, config: FullConfig, base: BaseInfo) -> None:
        """Raises UnsupportedBase for a quantised base: what was rounded away cannot be trained."""
        if base.quantization != "none":
            raise UnsupportedBase(
                f"full tuning needs the weights themselves, and this base is quantised to {base.quantization}: use "
                "lora or qlora, or start the server with --quantization none"
            )

    def estimate(self, config: FullConfig, base: BaseInfo, dataset: DatasetInfo, device: DeviceInfo) -> Estimate:
        """The float32 copy, its gradients and AdamW's two moments; then the activations, and the saved tensors."""
        trained = base.parameter_count
        activations = activation_bytes(base, config.micro_batch_tokens, compute_bytes=4)
        # While the artifact is written, its tensors stand where gradients and activations stood. A tenth more for what
        # the allocator cannot use.
        return Estimate(
            trained_parameters=trained,
            memory_bytes=16 * trained * 11 // 10 + max(activations, base.weight_bytes),
            artifact_bytes=base.weight_bytes + 65_536 + 256 * len(base.linear_modules),
        )

    def build(self, base: BaseModelHandle, config: FullConfig) -> Trainable:
        """Gives every parameter its own float32 storage; what was tied stays tied."""
        import torch

        copies: dict[int, torch.nn.Parameter] = {}
        for module in base.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                key = id(parameter)
                if key not in copies:
                    copies[key] = torch.nn.Parameter(parameter.detach().to(torch.float32, copy=True))
                module._parameters[name] = copies[key]
        base.model.requires_grad_(True)
        # Evaluation mode: the base's own dropout stays off, as it is for adapters.
        return _Copy(base.model.eval(), dict(base.model.named_parameters()), save_dtype=base.info.dtype)

    def loss(self, trainable: Trainable, batch: PackedBatch) -> torch.Tensor:
        """As by default; on CUDA matrices are multiplied in bfloat16, from float32 weights."""
        import torch

        with torch.autocast("cuda", torch.bfloat16, enabled=batch.input_ids.is_cuda):
            return super().loss(trainable, batch)

    def save(self, trainable: Trainable) -> SavedArtifact:
        """config.json, model.safetensors and, where the base has one, generation_config.json."""
        import torch

        assert isinstance(trainable, _Copy)  # made by build above
        model: Any = trainable.model
        dtype: torch.dtype = getattr(torch, trainable.save_dtype)
        tensors = {
            name: parameter.detach().to("cpu", dtype).contiguous() for name, parameter in trainable.parameters.items()
        }
        persistent = set(model.state_dict())
        tensors |= {name: buffer.to("cpu") for name, buffer in model.named_buffers() if name in persistent}
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = dtype
        config._name_or_path = ""  # a path of the server's is nobody's business
        documents: dict[str, Mapping[str, Any]] = {"config.json": json.loads(config.to_json_string())}
        if getattr(model, "generation_config", None) is not None:
            documents["generation_config.json"] = json.loads(model.generation_config.to_json_string())
        return SavedArtifact(tensors={"model.safetensors": tensors}, documents=documents)

    def load(self, artifact: Artifact, base: BaseInfo) -> Sequence[FullWeights]:
        """One FullWeights. The configuration must be the base's in everything that the forward depends on; names and
        shapes are compared with the base's by the engine."""
        _check_config(artifact.json("config.json"), base)
        files = [name for name in artifact.names() if _WEIGHTS.fullmatch(name)]
        if not files:
            raise ArtifactError(
                "model.safetensors",
                f"model.safetensors is missing; pickled weights are not read. The files are: "
                f"{', '.join(artifact.names())}",
            )
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            for name, tensor in artifact.tensors(file).items():
                if name in tensors:
                    raise ArtifactError(name, f"{name} is in two files")
                _check_values(name, tensor)
                tensors[name] = tensor
        return [FullWeights(tensors=tensors)]


def _check_config(config: Mapping[str, Any], base: BaseInfo) -> None:
    architectures = config.get("architectures") or [base.architecture]
    if architectures != [base.architecture]:
        raise ArtifactError(
            "architectures", f"architectures is {_short(architectures)}; the base is {base.architecture}"
        )
    config = _with_rope_parameters(config)
    for key, value in config.items():
        # What the base's configuration does not have at all, its class does not read.
        if key in _DESCRIPTIVE or key.startswith("_") or key not in base.config:
            continue
        if value is None and key in _DERIVED:
            continue
        if not _same(value, base.config[key]):
            raise ArtifactError(key, f"config.json: {key} is {_short(value)}; the base has {_short(base.config[key])}")


def _with_rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers before 5 wrote rope_theta and rope_scaling where now there is rope_parameters."""
    result = dict(config)
    if "rope_theta" in result and "rope_parameters" not in result:
        scaling = result.pop("rope_scaling", None)
        scaling = scaling if isinstance(scaling, dict) else {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        others = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
        result["rope_parameters"] = {"rope_theta": result.pop("rope_theta"), "rope_type": kind, **others}
    return result


def _same(a: Any, b: Any) -> bool:
    """Equal as settings: a missing key and null are the same, and so are 1 and 1.0."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(_same(a.get(key), b.get(key)) for key in {*a, *b})
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _check_values(name: str, tensor: torch.Tensor) -> None:
    import torch

    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ArtifactError(name, f"tensor {name} has values that are not finite")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "..."


@hookimpl
def graftwork_register_strategies() -> list[Strategy]:
    """Brings `full`."""
    return [FullTuning()]


@hookimpl
def graftwork_identify_artifact(artifact: Artifact) -> str | None:
    """A checkpoint is a config.json with model weights, and no adapter's configuration."""
    names = artifact.names()
    weights = any(_WEIGHTS.fullmatch(name) for name in names)
    return FullTuning.id if weights and "config.json" in names and "adapter_config.json" not in names else None
