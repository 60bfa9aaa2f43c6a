"""The tensors of a LoRA artifact, as deltas. The tensors decide what is bound; the configuration must agree.

What PEFT writes for a module X of the base, after "base_model.model.":

    X.lora_A.weight, X.lora_B.weight            the update of a linear layer; X.lora_B.bias with lora_bias
    X.lora_embedding_A, X.lora_embedding_B      the update of an embedding
    X.lora_magnitude_vector                     DoRA's magnitudes
    X.base_layer.bias, X.bias                   the base's bias, trained too (bias "lora_only" and "all")
    X.weight, X.bias                            a module of modules_to_save
    X.token_adapter.trainable_tokens_delta      rows of trainable_token_indices
    X.base_layer.lora_A.weight, ...             stacked experts (lora_experts.py)
    X.base_layer.weight, X.weight               a copy of the base's embedding or output layer (save_embedding_layers)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graftwork_plugins import ArtifactError, BaseInfo, Delta, LowRank, Replace
from graftwork_plugins.peft_format.adapter_config import LoraAdapterConfig
from graftwork_plugins.peft_format.files import (
    BASE_LAYER,
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    check_dtype,
    check_values,
    unsupported,
)
from graftwork_plugins.peft_format.lora_experts import expert_deltas, targeted_parameters
from graftwork_plugins.peft_format.module_names import no_such_module
from graftwork_plugins.peft_format.saved_modules import replacements

if TYPE_CHECKING:
    import torch

_UPDATE = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)"
)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_ACCEPTED = (
    "accepted are base_model.model.<linear layer>.lora_A.weight and lora_B.weight, and what PEFT saves for "
    "embeddings, DoRA, biases, modules_to_save and trainable_token_indices where adapter_config.json asks for it"
)


@dataclass
class _Tensors:
    """An artifact's tensors by what they are for; names are those of the base's modules."""

    updates: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))
    """By module, then by part: "lora_A.weight", ..."""
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))
    copies: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))


def lora_deltas(tensors: Mapping[str, torch.Tensor], config: LoraAdapterConfig, base: BaseInfo) -> list[Delta]:
    """What the tensors change. Raises ArtifactError naming the tensor or key that cannot be served, PatternError."""
    by_use = _sort_tensors(tensors, config, base)
    of_experts, taken = expert_deltas(by_use.updates, config, base)
    updates = {module: by_use.updates[module] for module in sorted(by_use.updates) if module not in taken}
    _check_targets(updates, config, base)
    deltas: list[Delta] = [*of_experts]
    deltas += [_low_rank(module, parts, config, base) for module, parts in updates.items()]
    deltas += replacements(by_use.replaced, config, base)
    deltas += _token_rows(by_use.tokens, config, base)
    deltas += [Replace(module=m, tensors=dict(copy), copy_of_base=True) for m, copy in by_use.copies.items()]
    return deltas


def _sort_tensors(tensors: Mapping[str, torch.Tensor], config: LoraAdapterConfig, base: BaseInfo) -> _Tensors:
    result = _Tensors()
    experts = targeted_parameters(config, base)
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(PREFIX)
        if match := _UPDATE.fullmatch(name):
            module = match["module"]
            known = base.embedding_modules if "embedding" in match["part"] else base.linear_modules
            if "magnitude" in match["part"]:
                known = {**base.linear_modules, **base.embedding_modules}
            if module not in known and module.removesuffix(BASE_LAYER * module.count(BASE_LAYER)) not in experts:
                raise no_such_module(full_name, module, known)
            check_dtype(full_name, tensor)  # the engine checks the values of updates
            result.updates[module][match["part"]] = tensor
        elif name.endswith(_TOKENS):
            check_values(full_name, tensor)
            result.tokens[name.removesuffix(_TOKENS)] = tensor
        elif ".original_module." in name or ".modules_to_save." in name:
            continue  # with bias="all", PEFT saves these beside the module's own tensors and never reads them
        else:
            _sort_parameter(full_name, name, tensor, config, base, result)
    return result


def _sort_parameter(
    full_name: str, name: str, tensor: torch.Tensor, config: LoraAdapterConfig, base: BaseInfo, result: _Tensors
) -> None:
    """A tensor that stands for one of the base's own parameters."""
    module, _, leaf = name.rpartition(".")
    of_adapted = module.endswith(BASE_LAYER)
    # ".token_adapter.base_layer": the embedding under trainable_token_indices.
    module = module.removesuffix(BASE_LAYER).removesuffix(".token_adapter")
    if f"{module}.{leaf}" not in base.parameters or not name:
        raise unsupported(full_name, _ACCEPTED)
    check_values(full_name, tensor)
    ties = config.ties_saved_modules() and module in base.tied_modules
    is_saved_whole = not of_adapted and (config.is_saved_whole(module) or (ties and leaf == "weight"))
    is_saved_bias = leaf == "bias" and (config.bias == "all" or (config.bias == "lora_only" and of_adapted))
    if is_saved_whole or is_saved_bias:
        result.replaced[module][leaf] = tensor
    elif leaf == "weight" and module in (base.input_module, base.output_module, *base.tied_modules):
        result.copies[module][leaf] = tensor
    else:
        key = f'bias is "{config.bias}"' if leaf == "bias" else "modules_to_save does not name its module"
        raise ArtifactError(full_name, f"tensor {full_name} is not supported: {key} in {CONFIG_FILE}; {_ACCEPTED}")


# ---------------------------------------------------------------------------------------------- updates


def _check_targets(updates: Mapping[str, object], config: LoraAdapterConfig, base: BaseInfo) -> None:
    """What the configuration names and what the tensors are for must be the same modules."""
    targets = set(config.targets(base))
    for module in sorted(targets):
        # PEFT adapts nothing within a module that is saved whole.
        if module not in updates and not config.is_saved_whole(module):
            raise ArtifactError(module, f"target_modules names {module}, but {WEIGHTS_FILE} has no tensors of it")
    if config.ties_targets():
        targets |= {*base.tied_modules, base.input_module or ""}
    for module in updates if config.target_modules is not None else ():
        # PEFT builds no layer for such a tensor, so it would answer without it.
        if module not in targets:
            raise ArtifactError(
                module,
                f"{WEIGHTS_FILE} has tensors of {module}, which target_modules (with exclude_modules and "
                f"layers_to_transform) in {CONFIG_FILE} does not name; name it there, or remove its tensors",
            )


def _low_rank(module: str, parts: Mapping[str, torch.Tensor], config: LoraAdapterConfig, base: BaseInfo) -> LowRank:
    is_embedding = module in base.embedding_modules
    a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    for wanted, there in ((a_name, b_name), (b_name, a_name)):
        if wanted not in parts:
            what = f"{there.split('.')[0]} but no {wanted.split('.')[0]}" if there in parts else f"no {wanted}"
            raise ArtifactError(f"{PREFIX}{module}.{wanted}", f"{module} has {what}")
    a, b = parts[a_name], parts[b_name]
    in_features, out_features = (base.embedding_modules if is_embedding else base.linear_modules)[module]
    _check_shapes(module, a_name, a, b_name, b, in_features, out_features)
    # A tied layer has the embedding's update, whatever rank a pattern gives it; its scaling is by its own pattern.
    tied_to = base.input_module if module in base.tied_modules and config.ties_targets() else None
    rank = config.patterns.rank(tied_to or module)
    if a.shape[0] != rank:
        raise ArtifactError(
            f"{PREFIX}{module}.{a_name}",
            f"{a_name.split('.')[0]} of {module} has rank {a.shape[0]}; r and rank_pattern in {CONFIG_FILE} say {rank}",
        )
    return LowRank(
        module=module,
        a=a,
        b=b,
        scaling=config.patterns.scaling(module),
        bias=_vector(module, "lora_B.bias", parts, "lora_bias", config.lora_bias and not is_embedding, out_features),
        magnitude=_vector(module, "lora_magnitude_vector", parts, "use_dora", config.use_dora, out_features),
    )


def _vector(
    module: str, part: str, parts: Mapping[str, torch.Tensor], key: str, wanted: bool, size: int
) -> torch.Tensor | None:
    """A tensor [size] that is there exactly if the configuration's `key` asks for it."""
    name, tensor = f"{PREFIX}{module}.{part}", parts.get(part)
    if tensor is None:
        if wanted:
            raise ArtifactError(name, f"{name} is missing, but {CONFIG_FILE} has {key} = true")
        return None
    if not wanted:
        what = "belongs to DoRA" if key == "use_dora" else "is a bias"
        raise ArtifactError(name, f"tensor {name} is not supported: it {what}, and {key} in {CONFIG_FILE} is not true")
    if tuple(tensor.shape) != (size,):
        raise ArtifactError(name, f"tensor {name} has the shape {list(tensor.shape)}; this base takes [{size}]")
    return tensor


def _check_shapes(
    module: str, a_name: str, a: torch.Tensor, b_name: str, b: torch.Tensor, in_features: int, out_features: int
) -> None:
    for name, tensor in ((a_name, a), (b_name, b)):
        if tensor.ndim != 2:
            full_name = f"{PREFIX}{module}.{name}"
            raise ArtifactError(
                full_name, f"tensor {full_name} has the shape {list(tensor.shape)}; a matrix is expected"
            )
    sizes = f"the base's layer has {in_features} (in) and {out_features} (out)"
    a_short, b_short = a_name.split(".")[0], b_name.split(".")[0]
    if a.shape[1] != in_features:
        raise ArtifactError(f"{PREFIX}{module}.{a_name}", f"{a_short} of {module} takes {a.shape[1]} features; {sizes}")
    if b.shape[0] != out_features:
        raise ArtifactError(f"{PREFIX}{module}.{b_name}", f"{b_short} of {module} gives {b.shape[0]} features; {sizes}")
    if a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise ArtifactError(
            f"{PREFIX}{module}.{b_name}",
            f"{a_short} of {module} has rank {a.shape[0]}, {b_short} {b.shape[1]}; they must be equal",
        )


# ---------------------------------------------------------------------------------------------- rows of tokens


def _token_rows(tokens: Mapping[str, torch.Tensor], config: LoraAdapterConfig, base: BaseInfo) -> list[Replace]:
    """Rows of trainable_token_indices. Where the base ties its output layer to the input embedding, PEFT gives both
    the same rows unless the output layer has rows of its own."""
    indices = config.trainable_token_indices
    wanted = dict(indices) if isinstance(indices, Mapping) else {base.input_module or "": indices} if indices else {}
    rows: dict[str, tuple[list[int], torch.Tensor]] = {}
    for module, tensor in tokens.items():
        name = f"{PREFIX}{module}{_TOKENS}"
        key = next((key for key in wanted if module.endswith(key)), None)
        if key is None or f"{module}.weight" not in base.parameters:
            raise ArtifactError(name, f"tensor {name} is not supported: trainable_token_indices does not name {module}")
        count, size = base.parameters[f"{module}.weight"]
        if list(tensor.shape) != [len(wanted[key]), size]:
            raise ArtifactError(
                name,
                f"tensor {name} has the shape {list(tensor.shape)}; trainable_token_indices and the base say "
                f"{[len(wanted[key]), size]}",
            )
        if len(set(wanted[key])) != len(wanted[key]) or not all(0 <= token < count for token in wanted[key]):
            raise ArtifactError(
                "trainable_token_indices",
                f"trainable_token_indices of {key} must be different token ids from 0 to {count - 1}",
            )
        rows[module] = (list(wanted[key]), tensor)
    if base.input_module in rows:
        for tied in base.tied_modules:
            rows.setdefault(tied, rows[base.input_module])
    for key in wanted:
        if not any(module.endswith(key) for module in rows):
            raise ArtifactError(
                "trainable_token_indices",
                f"trainable_token_indices names {key}, but {WEIGHTS_FILE} has no trainable_tokens_delta of it",
            )
    for module in rows:
        if f"{module}.bias" in base.parameters:
            raise ArtifactError(
                "trainable_token_indices",
                f"trainable_token_indices of {module} is not supported: the layer has a bias, which PEFT drops; "
                "embeddings and layers without a bias are accepted",
            )
    return [
        Replace(module=module, tensors={"weight": tensor}, rows=indices)
        for module, (indices, tensor) in sorted(rows.items())
    ]
