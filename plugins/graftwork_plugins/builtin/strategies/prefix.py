"""Prompt tuning (arXiv:2104.08691), P-tuning (arXiv:2103.10385) and prefix tuning (arXiv:2101.00190) as PEFT saves it.

Serving only: PEFT puts one prefix before a whole batch row, which does not go together with packed training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from graftwork_plugins import (
    Artifact,
    ArtifactError,
    BaseInfo,
    BaseModelHandle,
    DatasetInfo,
    DeviceInfo,
    Estimate,
    Prefix,
    SavedArtifact,
    Strategy,
    Trainable,
    TrainingConfig,
    hookimpl,
)
from graftwork_plugins.peft_format.adapter_config import PROMPTS, read_prompt_config
from graftwork_plugins.peft_format.files import CONFIG_FILE, artifact_files, check_values, peft_type, read_tensors

if TYPE_CHECKING:
    import torch

_TENSOR = "prompt_embeddings"


class PrefixStrategy(Strategy):
    """Served as Prefix deltas."""

    id = "prefix"
    version = "1.0"
    description = "Virtual tokens before the prompt: PEFT's prompt tuning, P-tuning and prefix tuning. Serving only."
    artifact_files = artifact_files(" or ".join(PROMPTS))
    capabilities = frozenset({"serve"})
    Config = TrainingConfig

    def load(self, artifact: Artifact, base: BaseInfo) -> Sequence[Prefix]:
        """One Prefix."""
        config = read_prompt_config(artifact.json(CONFIG_FILE))
        tensor = _read_tensor(artifact)
        count, size, layers = config.num_virtual_tokens, config.token_dim, config.num_layers
        wanted = [count, size if config.are_embeddings else 2 * layers * size]
        if list(tensor.shape) != wanted:
            raise ArtifactError(_TENSOR, f"{_TENSOR} has the shape {list(tensor.shape)}; {CONFIG_FILE} says {wanted}")
        if config.are_embeddings:
            return [Prefix(embeddings=tensor)]
        heads = config.num_attention_heads
        if size % heads:
            raise ArtifactError(
                "token_dim", f"token_dim is {size}; a multiple of num_attention_heads {heads} is accepted"
            )
        # [virtual tokens, 2 * layers, heads, head_dim] -> [2 * layers, heads, virtual tokens, head_dim]
        both = tensor.view(count, 2 * layers, heads, size // heads).permute(1, 2, 0, 3)
        return [Prefix(keys=list(both[0::2]), values=list(both[1::2]))]

    def estimate(self, config: Any, base: BaseInfo, dataset: DatasetInfo, device: DeviceInfo) -> Estimate:
        """Never called: the strategy declares that it cannot train."""
        _cannot_train()

    def build(self, base: BaseModelHandle, config: Any) -> Trainable:
        """Never called."""
        _cannot_train()

    def save(self, trainable: Trainable) -> SavedArtifact:
        """Never called."""
        _cannot_train()


def _cannot_train() -> NoReturn:
    raise NotImplementedError("prefix serves adapters and does not train them")


def _read_tensor(artifact: Artifact) -> torch.Tensor:
    """The only tensor of the file. Raises ArtifactError."""
    tensors = read_tensors(artifact)
    if _TENSOR not in tensors:
        raise ArtifactError(_TENSOR, f"{_TENSOR} is missing; the tensors are {', '.join(sorted(tensors)) or 'none'}")
    for name in tensors:
        if name != _TENSOR:
            raise ArtifactError(name, f"tensor {name} is not supported; {_TENSOR} alone is accepted")
    check_values(_TENSOR, tensors[_TENSOR])
    return tensors[_TENSOR]


@hookimpl
def graftwork_register_strategies() -> list[Strategy]:
    """Brings `prefix`."""
    return [PrefixStrategy()]


@hookimpl
def graftwork_identify_artifact(artifact: Artifact) -> str | None:
    """PEFT's configuration says what it is."""
    return PrefixStrategy.id if peft_type(artifact) in PROMPTS else None
