"""A Graftwork strategy in one module: low-rank updates of the attention's output layers.

Written as an outsider would: nothing of Graftwork but graftwork_plugins, and torch only inside functions, so that the
server can list the strategy without paying for torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from graftwork_plugins import (
    Artifact,
    ArtifactError,
    BaseInfo,
    BaseModelHandle,
    ConfigError,
    DatasetInfo,
    DeviceInfo,
    Estimate,
    LowRank,
    SavedArtifact,
    Strategy,
    Trainable,
    TrainingConfig,
    activation_bytes,
    hookimpl,
)

if TYPE_CHECKING:
    import torch

OUTPUT_LAYERS = ("o_proj", "out_proj", "dense", "c_proj")
"""What architectures call the layer after attention; it must lie in a module whose name has "attn" or "attention"."""

DOCUMENT, WEIGHTS = "attention_lora.json", "attention_lora.safetensors"


class Settings(TrainingConfig):
    """What can be set beside the training settings that every strategy has."""

    learning_rate: float = Field(5e-4, gt=0, le=10, description="Peak learning rate of AdamW.")
    rank: int = Field(8, ge=1, le=256, description="Rank of the updates.")
    scaling: float = Field(2.0, gt=0, le=1000, description="Factor of the updates.")


def output_layers(base: BaseInfo) -> list[str]:
    """The base's attention output layers, by name."""
    return [
        name for name in base.linear_modules if name.endswith(OUTPUT_LAYERS) and ("attn" in name or "attention" in name)
    ]


class AttentionLora(Strategy):
    """y += scaling * (x A^T) B^T on each attention output layer; B starts at 0."""

    id = "attention-lora"
    version = "0.1.0"
    description = "Example: low-rank updates of the attention's output layers only."
    artifact_files = f"{DOCUMENT} and {WEIGHTS}"
    Config = Settings

    def validate(self, config: Settings, base: BaseInfo) -> None:
        """The base must have such layers, and the rank must be below their width."""
        layers = output_layers(base)
        if not layers:
            raise ConfigError("rank", f"{base.architecture} has no attention output layer that this strategy knows")
        width = min(min(base.linear_modules[layer]) for layer in layers)
        if config.rank > width:
            raise ConfigError("rank", f"rank is {config.rank}; at most {width}, the layers' width, is accepted")

    def estimate(self, config: Settings, base: BaseInfo, dataset: DatasetInfo, device: DeviceInfo) -> Estimate:
        """Parameters, gradients and AdamW's two moments in float32; the activations; the updates beside them."""
        layers = output_layers(base)
        trained = sum(config.rank * sum(base.linear_modules[layer]) for layer in layers)
        widths = sum(sum(base.linear_modules[layer]) + config.rank for layer in layers)
        activations = activation_bytes(base, config.micro_batch_tokens)
        return Estimate(
            trained_parameters=trained,
            memory_bytes=16 * trained + activations + 8 * config.micro_batch_tokens * widths,
            artifact_bytes=4 * trained + 200 * len(layers) + 4096,
        )

    def build(self, base: BaseModelHandle, config: Settings) -> Trainable:
        """Hooks beside the base's layers; the base itself stays as it is."""
        import torch

        parameters: dict[str, torch.nn.Parameter] = {}
        for layer in output_layers(base.info):
            in_features, out_features = base.info.linear_modules[layer]
            module: Any = base.model.get_submodule(layer)
            a = torch.nn.Parameter(torch.randn(config.rank, in_features, device=base.device) / in_features**0.5)
            b = torch.nn.Parameter(torch.zeros(out_features, config.rank, device=base.device))
            # Registered with the layer, so that the model's parameters() has them too.
            module.attention_lora_a, module.attention_lora_b = a, b
            module.register_forward_hook(_updated(a, b, config.scaling))
            parameters |= {f"{layer}.a": a, f"{layer}.b": b}
        base.model.attention_lora_scaling = config.scaling  # type: ignore[assignment]
        return Trainable(base.model, parameters)

    def save(self, trainable: Trainable) -> SavedArtifact:
        """A and B by layer, and the factor."""
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable.parameters.items()}
        scaling: Any = trainable.model.attention_lora_scaling
        return SavedArtifact(tensors={WEIGHTS: tensors}, documents={DOCUMENT: {"scaling": scaling}})

    def load(self, artifact: Artifact, base: BaseInfo) -> Sequence[LowRank]:
        """One LowRank for each layer. Shapes and finiteness are the engine's to check."""
        scaling = artifact.json(DOCUMENT).get("scaling")
        if not isinstance(scaling, int | float):
            raise ArtifactError("scaling", f"{DOCUMENT}: scaling must be a number")
        tensors = artifact.tensors(WEIGHTS)
        layers = sorted({name.rpartition(".")[0] for name in tensors})
        for layer in layers:
            for matrix in ("a", "b"):
                if f"{layer}.{matrix}" not in tensors:
                    raise ArtifactError(f"{layer}.{matrix}", f"{WEIGHTS} lacks {layer}.{matrix}")
        return [
            LowRank(module=layer, a=tensors[f"{layer}.a"], b=tensors[f"{layer}.b"], scaling=float(scaling))
            for layer in layers
        ]


def _updated(a: torch.nn.Parameter, b: torch.nn.Parameter, scaling: float) -> Any:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        update = scaling * (inputs[0].float() @ a.t()) @ b.t()
        return output + update.to(output.dtype)

    return hook


@hookimpl
def graftwork_register_strategies() -> list[Strategy]:
    """Brings the one strategy."""
    return [AttentionLora()]


@hookimpl
def graftwork_identify_artifact(artifact: Artifact) -> str | None:
    """By the name of its document."""
    return AttentionLora.id if DOCUMENT in artifact.names() else None
