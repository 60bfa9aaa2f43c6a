"""LoRA on parameters of a mixture of experts: the experts' stacked matrices, the router (PEFT's target_parameters).

PEFT wraps the module once for each of its targeted parameters, in the order in which the module declares them, so that
the last one's tensors are the module's own ("experts.lora_A.weight") and each earlier one's lie a level deeper
("experts.base_layer.lora_A.weight"). A holds all experts' ranks stacked expert by expert, B rank by rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from graftwork_plugins import ArtifactError, BaseInfo, LowRank
from graftwork_plugins.peft_format.adapter_config import LoraAdapterConfig
from graftwork_plugins.peft_format.files import BASE_LAYER, CONFIG_FILE, PREFIX, WEIGHTS_FILE

if TYPE_CHECKING:
    import torch

_PARTS = ("lora_A.weight", "lora_B.weight")


def targeted_parameters(config: LoraAdapterConfig, base: BaseInfo) -> dict[str, list[str]]:
    """The parameters that the configuration names, by module, in the base's order. Raises ArtifactError."""
    found: dict[str, list[str]] = {}
    for target in config.target_parameters:
        matches = [name for name in base.parameters if name == target or name.endswith(f".{target}")]
        known = [name for name, shape in base.parameters.items() if _is_of_mixture(name, shape, base)]
        kinds = sorted({".".join(name.split(".")[-2:]) for name in known})
        if not matches or not set(matches) <= set(known):
            what = "which the base has not" if not matches else "which is of no mixture of experts"
            accepted = (
                f"accepted here are {', '.join(kinds)}" if kinds else "this base has no experts; null is accepted"
            )
            raise ArtifactError("target_parameters", f"target_parameters names {target}, {what}; {accepted}")
    for name in base.parameters:
        if any(name == target or name.endswith(f".{target}") for target in config.target_parameters):
            module, _, parameter = name.rpartition(".")
            found.setdefault(module, []).append(parameter)
    return found


def _is_of_mixture(name: str, shape: tuple[int, ...], base: BaseInfo) -> bool:
    """A stack of matrices, or a matrix that is no ordinary layer's: a router's."""
    module = name.rpartition(".")[0]
    return len(shape) == 3 or (
        len(shape) == 2 and module not in base.linear_modules and module not in base.embedding_modules
    )


def expert_deltas(
    updates: Mapping[str, Mapping[str, torch.Tensor]], config: LoraAdapterConfig, base: BaseInfo
) -> tuple[list[LowRank], set[str]]:
    """LowRank deltas of the targeted parameters, and which of `updates` (by module as in the file) they took."""
    deltas: list[LowRank] = []
    taken: set[str] = set()
    for module, parameters in targeted_parameters(config, base).items():
        for depth, parameter in enumerate(reversed(parameters)):
            level = module + depth * BASE_LAYER
            parts = updates.get(level, {})
            for part in _PARTS:
                if part not in parts:
                    name = f"{PREFIX}{level}.{part}"
                    raise ArtifactError(
                        name, f"target_parameters names {module}.{parameter}, but {WEIGHTS_FILE} has no {name}"
                    )
            for part in parts:
                if part not in _PARTS:
                    name = f"{PREFIX}{level}.{part}"
                    raise ArtifactError(name, f"tensor {name} is not supported: A and B of parameters are accepted")
            deltas.append(_delta(module, parameter, level, parts, config, base))
            taken.add(level)
    return deltas, taken


def _delta(
    module: str,
    parameter: str,
    level: str,
    parts: Mapping[str, torch.Tensor],
    config: LoraAdapterConfig,
    base: BaseInfo,
) -> LowRank:
    *stack, out_features, in_features = base.parameters[f"{module}.{parameter}"]
    experts = stack[0] if stack else 1
    rank = config.patterns.rank(f"{module}.{parameter}")
    a, b = (parts[part] for part in _PARTS)
    for part, tensor, wanted in (
        (_PARTS[0], a, [rank * experts, in_features]),
        (_PARTS[1], b, [out_features, rank * experts]),
    ):
        if list(tensor.shape) != wanted:
            raise ArtifactError(
                f"{PREFIX}{level}.{part}",
                f"tensor {PREFIX}{level}.{part} has the shape {list(tensor.shape)}; for {parameter} with {experts} "
                f"experts and the rank {rank} of {CONFIG_FILE} it must be {wanted}",
            )
    return LowRank(
        module=module,
        parameter=parameter,
        a=a.reshape(experts, rank, in_features) if stack else a,
        b=b.reshape(out_features, rank, experts).permute(2, 0, 1).contiguous() if stack else b,
        scaling=config.patterns.scaling(f"{module}.{parameter}"),
    )
