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
    Automatic,
    BaseInfo,
    BaseModelHandle,
    Choice,
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
    activation_bytes,
    all_finite,
    hookimpl,
    without_derived,
)
from graftwork_plugins.builtin.checkpoint_config import check_config
from graftwork_plugins.builtin.learning_rates import FULL_RATE, FULL_WIDTH, full_rate, model_width

if TYPE_CHECKING:
    import torch

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def _learning_rate(config: FullConfig, base: BaseInfo) -> Choice:
    rate = float(f"{full_rate(base):.2g}")
    return Choice(
        rate,
        f"{FULL_RATE:g} is usual at width {FULL_WIDTH}, and the best rate falls as width rises: {model_width(base)}",
    )


class FullConfig(TrainingConfig):
    """Settings of full tuning."""

    learning_rate: Annotated[float, Automatic(_learning_rate)] = Field(
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
        # A base whose files hold an output layer of its own may say that it is tied.
        output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if output is not None and output.weight is not embedding.weight:
            config.tie_word_embeddings = False
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
        config = artifact.json("config.json")
        check_config(config, base)
        files = [name for name in artifact.names() if _WEIGHTS.fullmatch(name)]
        if not files:
            raise ArtifactError(
                "model.safetensors",
                f"model.safetensors is missing; pickled weights are not read. The files are: "
                f"{', '.join(artifact.names())}",
            )
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            for name, tensor in without_derived(artifact.tensors(file)).items():
                if name in tensors:
                    raise ArtifactError(name, f"{name} is in two files")
                if tensor.is_floating_point() and not all_finite(tensor):
                    raise ArtifactError(name, f"tensor {name} has values that are not finite")
                tensors[name] = tensor
        _resolve_tie(tensors, config, base)
        return [FullWeights(tensors=tensors)]


def _resolve_tie(tensors: dict[str, torch.Tensor], config: Mapping[str, Any], base: BaseInfo) -> None:
    """Gives the output layer the weight that transformers gives it: its own where the files hold one; else, where the
    checkpoint ties it, the input embedding's. The base may be tied or not."""
    from transformers import CONFIG_MAPPING

    if base.output_module is None or base.input_module is None:
        return
    output, embedding = f"{base.output_module}.weight", f"{base.input_module}.weight"
    missing, present = (output, embedding) if embedding in tensors else (embedding, output)
    if missing in tensors or present not in tensors:
        return
    # A config.json leaves out what its class has by default.
    default = CONFIG_MAPPING[base.config["model_type"]]().tie_word_embeddings
    if not config.get("tie_word_embeddings", default):
        raise ArtifactError(
            missing,
            f"no file has {missing}, and config.json does not say tie_word_embeddings, which would do without it",
        )
    if base.output_module not in base.tied_modules:
        tensors[missing] = tensors[present]


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
