"""Prompt tuning (arXiv:2104.08691), P-tuning (arXiv:2103.10385) and prefix tuning (arXiv:2101.00190) as PEFT saves it.

Serving only: PEFT puts one prefix before a whole batch row, which does not go together with packed training rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from graftwork_plugins.peft_format.files import CONFIG_FILE, artifact_files, check_values, peft_type, read_tensors
from graftwork_plugins.peft_format.keys import DESCRIPTIVE, check_auto_mapping, refuse_unknown, require

if TYPE_CHECKING:
    import torch

_TENSOR = "prompt_embeddings"
_EMBEDDED = ("PROMPT_TUNING", "P_TUNING")
_KINDS = (*_EMBEDDED, "PREFIX_TUNING")

_READ = frozenset(
    """
    peft_type task_type num_virtual_tokens token_dim num_layers num_attention_heads num_transformer_submodules
    """.split()  # noqa: SIM905 - as below
)
_TRAINING = frozenset(
    """
    prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs encoder_hidden_size prefix_projection init_weights
    encoder_reparameterization_type encoder_num_layers
    """.split()  # noqa: SIM905 - one name a line would fill a page
)
"""Keys that matter in training alone: PEFT saves what its encoders and projections give."""


class PrefixStrategy(Strategy):
    """Served as Prefix deltas."""

    id = "prefix"
    version = "1.0"
    description = "Virtual tokens before the prompt: PEFT's prompt tuning, P-tuning and prefix tuning. Serving only."
    artifact_files = artifact_files(" or ".join(_KINDS))
    capabilities = frozenset({"serve"})
    Config = TrainingConfig

    def load(self, artifact: Artifact, base: BaseInfo) -> Sequence[Prefix]:
        """One Prefix."""
        document = artifact.json(CONFIG_FILE)
        sizes = _sizes(document)
        tensors = read_tensors(artifact)
        if _TENSOR not in tensors:
            raise ArtifactError(
                _TENSOR, f"{_TENSOR} is missing; the tensors are {', '.join(sorted(tensors)) or 'none'}"
            )
        for name in tensors:
            if name != _TENSOR:
                raise ArtifactError(name, f"tensor {name} is not supported; {_TENSOR} alone is accepted")
        tensor = tensors[_TENSOR]
        check_values(_TENSOR, tensor)
        count, size = sizes["num_virtual_tokens"], sizes["token_dim"]
        embedded = document["peft_type"] in _EMBEDDED
        wanted = [count, size if embedded else 2 * sizes["num_layers"] * size]
        if list(tensor.shape) != wanted:
            raise ArtifactError(_TENSOR, f"{_TENSOR} has the shape {list(tensor.shape)}; {CONFIG_FILE} says {wanted}")
        if embedded:
            return [Prefix(embeddings=tensor)]
        heads = sizes["num_attention_heads"]
        if size % heads:
            raise ArtifactError(
                "token_dim", f"token_dim is {size}; a multiple of num_attention_heads {heads} is accepted"
            )
        # [virtual tokens, 2 * layers, heads, head_dim] -> [2 * layers, heads, virtual tokens, head_dim]
        both: torch.Tensor = tensor.view(count, 2 * sizes["num_layers"], heads, size // heads).permute(1, 2, 0, 3)
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


def _sizes(document: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that adapter_config.json gives. Raises ArtifactError naming the key that does not fit."""
    require(document, "peft_type", document.get("peft_type") in _KINDS, ", ".join(_KINDS))
    require(document, "task_type", document.get("task_type") in (None, "CAUSAL_LM"), "CAUSAL_LM or null")
    submodules = document.get("num_transformer_submodules")
    require(document, "num_transformer_submodules", submodules in (None, 1), "1 or null")
    check_auto_mapping(document)
    refuse_unknown(document, _READ | _TRAINING | DESCRIPTIVE)
    names = ["num_virtual_tokens", "token_dim"]
    if document["peft_type"] == "PREFIX_TUNING":
        names += ["num_layers", "num_attention_heads"]
    for name in names:
        value = document.get(name)
        fits = type(value) is int and 0 < value <= 1_048_576
        require(document, name, fits, "a whole number from 1")
    return {name: document[name] for name in names}


@hookimpl
def graftwork_register_strategies() -> list[Strategy]:
    """Brings `prefix`."""
    return [PrefixStrategy()]


@hookimpl
def graftwork_identify_artifact(artifact: Artifact) -> str | None:
    """PEFT's configuration says what it is."""
    return PrefixStrategy.id if peft_type(artifact) in _KINDS else None
