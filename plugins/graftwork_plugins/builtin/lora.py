"""LoRA (arXiv:2106.09685) through PEFT: low-rank updates of linear layers, saved in PEFT's own format.

Training builds on PEFT. Serving reads adapter_config.json with an allow-list of its own (lora_config.py) and never
runs PEFT on what a client sent.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

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
    hookimpl,
)
from graftwork_plugins.builtin.lora_config import (
    LoraPatterns,
    PatternError,
    PatternMatcher,
    read_adapter_config,
    targets_of_names,
)
from graftwork_plugins.estimates import activation_bytes

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


class LoraConfig(TrainingConfig):
    """Settings of LoRA. Defaults after "LoRA Without Regret": every linear layer, ten times full tuning's learning
    rate whatever the rank, small batches."""

    learning_rate: float = Field(5e-4, gt=0, le=10, description="Peak learning rate of AdamW; ten times full tuning's.")
    r: int = Field(16, ge=1, le=1024, description="Rank of the updates.")
    lora_alpha: float = Field(32, gt=0, le=65_536, description="The updates are scaled by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the updates' input while training.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732).")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Linear layers to update, by full name or last parts of it; all-linear: all but the output layer.",
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict,
        description="Other ranks, by module name, its last parts, or a regular expression of them.",
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="Other values of lora_alpha, by name as in rank_pattern."
    )


class Lora(Strategy):
    """Trains with PEFT; served as LowRank deltas."""

    id = "lora"
    version = "1.0"
    description = "LoRA: low-rank updates of linear layers. Artifacts are PEFT's, in both directions."
    artifact_files = f"{CONFIG_FILE} with peft_type LORA and {WEIGHTS_FILE}, as PEFT's save_pretrained writes them"
    Config = LoraConfig

    def validate(self, config: LoraConfig, base: BaseInfo) -> None:
        """Every name and pattern must match a linear layer of the base; ranks and alphas must be positive."""
        if not config.target_modules:
            raise ConfigError("target_modules", "target_modules is empty; name linear layers, or say all-linear")
        for target in config.target_modules if isinstance(config.target_modules, list) else []:
            if not targets_of_names([target], base.linear_modules):
                raise ConfigError("target_modules", _matches_nothing("target_modules", target, base))
        targets = _targets(config, base)
        matcher = PatternMatcher()
        patterns: list[tuple[str, Mapping[str, float]]] = [
            ("rank_pattern", config.rank_pattern),
            ("alpha_pattern", config.alpha_pattern),
        ]
        for field, pattern in patterns:
            for key, value in pattern.items():
                if not 0 < value <= 65_536:
                    raise ConfigError(field, f"{field}: {key} is {value}; from 1 to 65536 is accepted")
                try:
                    if not any(matcher.first_match([key], target) for target in targets):
                        raise ConfigError(field, _matches_nothing(field, key, base))
                except PatternError as error:
                    raise ConfigError(field, f"{field}: {error}") from None

    def estimate(self, config: LoraConfig, base: BaseInfo, dataset: DatasetInfo, device: DeviceInfo) -> Estimate:
        """float32 updates with gradients and AdamW's two moments; activations, and PEFT's float32 copy of each
        adapted layer's input, its product with A, and its update."""
        patterns = LoraPatterns(config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern, False)
        targets = _targets(config, base)
        ranks = {target: patterns.rank(target) for target in targets}
        trained = sum(ranks[target] * sum(base.linear_modules[target]) for target in targets)
        updates = sum(sum(base.linear_modules[target]) + 2 * ranks[target] for target in targets)
        tokens = config.micro_batch_tokens
        compute_bytes = 4 if base.dtype == "float32" else 2
        return Estimate(
            trained_parameters=trained,
            memory_bytes=16 * trained
            + activation_bytes(base, tokens, compute_bytes=compute_bytes)
            + 4 * tokens * updates,
            artifact_bytes=4 * trained + 300 * len(targets) + 65_536,
        )

    def build(self, base: BaseModelHandle, config: LoraConfig) -> Trainable:
        """The base wrapped by PEFT, updates in float32, dropout on for the updates alone."""
        import peft

        peft_config = peft.LoraConfig(
            r=config.r,
            lora_alpha=_whole(config.lora_alpha),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            target_modules=config.target_modules,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern={name: _whole(alpha) for name, alpha in config.alpha_pattern.items()},
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(base.model, peft_config).eval()
        for name, module in model.named_modules():
            module.training = ".lora_dropout." in name
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return Trainable(model, parameters)

    def save(self, trainable: Trainable) -> SavedArtifact:
        """What PEFT's save_pretrained writes: adapter_config.json and adapter_model.safetensors."""
        import peft

        model: Any = trainable.model
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
        document = model.peft_config["default"].to_dict()
        document |= {"inference_mode": True, "base_model_name_or_path": None}
        return SavedArtifact(
            tensors={WEIGHTS_FILE: tensors}, documents={CONFIG_FILE: json.loads(json.dumps(document, default=_plain))}
        )

    def load(self, artifact: Artifact, base: BaseInfo) -> Sequence[LowRank]:
        """One LowRank for each adapted module. The tensors decide what is bound; the configuration must agree."""
        config = read_adapter_config(artifact.json(CONFIG_FILE))
        pairs = _pairs(_read_tensors(artifact), base)
        try:
            targets = config.targets(base)
            for module in targets:
                if module not in pairs:
                    raise ArtifactError(
                        module, f"target_modules names {module}, but {WEIGHTS_FILE} has no tensors of it"
                    )
            return [_delta(module, pairs[module], config.patterns) for module in sorted(pairs)]
        except PatternError as error:
            raise ArtifactError(error.key, str(error)) from None


def _targets(config: LoraConfig, base: BaseInfo) -> list[str]:
    if isinstance(config.target_modules, list):
        return targets_of_names(config.target_modules, base.linear_modules)
    return [name for name in base.linear_modules if name != base.output_module]


def _matches_nothing(field: str, name: str, base: BaseInfo) -> str:
    kinds = sorted({module.rpartition(".")[2] for module in base.linear_modules})
    return f"{field}: {name!r} matches no linear layer of the base; its linear layers end in {', '.join(kinds)}"


def _whole(alpha: float) -> Any:
    """PEFT declares alpha an int, computes with any number, and writes it down as it is given."""
    return int(alpha) if alpha == int(alpha) else alpha


def _plain(value: Any) -> Any:
    """PEFT keeps sets and enumerations in its configuration."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _read_tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    names = artifact.names()
    if WEIGHTS_FILE not in names and "adapter_model.bin" in names:
        raise ArtifactError(
            "adapter_model.bin",
            f"adapter_model.bin is a pickle, which is never read; save the adapter as {WEIGHTS_FILE} "
            "(save_pretrained with safe_serialization=True)",
        )
    return artifact.tensors(WEIGHTS_FILE)


def _pairs(tensors: Mapping[str, torch.Tensor], base: BaseInfo) -> dict[str, dict[str, torch.Tensor]]:
    """A and B by module, each shown to fit the base."""
    import torch

    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ArtifactError(name, f"tensor {name} is not supported: {_what_it_is(name)}")
        module = match["module"]
        if module not in base.linear_modules:
            close = difflib.get_close_matches(module, base.linear_modules, 1)
            hint = f"; the closest is {close[0]}" if close else ""
            raise ArtifactError(name, f"tensor {name} is for the module {module}, which the base has not{hint}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ArtifactError(name, f"tensor {name} is {tensor.dtype}; float32, bfloat16 and float16 are accepted")
        if tensor.ndim != 2:
            raise ArtifactError(name, f"tensor {name} has the shape {list(tensor.shape)}; a matrix is expected")
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(name, f"tensor {name} has values that are not finite")
        pairs.setdefault(module, {})[match["matrix"]] = tensor
    for module, pair in pairs.items():
        for matrix, other in (("A", "B"), ("B", "A")):
            if matrix not in pair:
                raise ArtifactError(
                    f"base_model.model.{module}.lora_{matrix}.weight", f"{module} has lora_{other} but no lora_{matrix}"
                )
        _check_shapes(module, pair["A"], pair["B"], base)
    return pairs


def _check_shapes(module: str, a: torch.Tensor, b: torch.Tensor, base: BaseInfo) -> None:
    in_features, out_features = base.linear_modules[module]
    name = f"base_model.model.{module}.lora_"
    if a.shape[1] != in_features:
        raise ArtifactError(
            f"{name}A.weight",
            f"lora_A of {module} takes {a.shape[1]} features; the base's layer has {in_features} (in) and "
            f"{out_features} (out)",
        )
    if b.shape[0] != out_features:
        raise ArtifactError(
            f"{name}B.weight",
            f"lora_B of {module} gives {b.shape[0]} features; the base's layer has {in_features} (in) and "
            f"{out_features} (out)",
        )
    if a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise ArtifactError(
            f"{name}B.weight", f"lora_A of {module} has rank {a.shape[0]}, lora_B {b.shape[1]}; they must be equal"
        )


def _delta(module: str, pair: Mapping[str, torch.Tensor], patterns: LoraPatterns) -> LowRank:
    rank = patterns.rank(module)
    if pair["A"].shape[0] != rank:
        raise ArtifactError(
            f"base_model.model.{module}.lora_A.weight",
            f"lora_A of {module} has rank {pair['A'].shape[0]}; r and rank_pattern in {CONFIG_FILE} say {rank}",
        )
    return LowRank(module=module, a=pair["A"], b=pair["B"], scaling=patterns.scaling(module))


def _what_it_is(name: str) -> str:
    accepted = "accepted are base_model.model.<linear layer>.lora_A.weight and lora_B.weight"
    if "lora_embedding" in name:
        return f"it adapts an embedding; {accepted}"
    if "lora_magnitude_vector" in name:
        return f"it belongs to DoRA; {accepted}"
    if name.endswith(".base_layer.weight") or ".embed_tokens." in name:
        return f"it is a copy of the base's weights; save with save_embedding_layers=False; {accepted}"
    if name.endswith(".bias"):
        return f"it is a bias; {accepted}"
    return accepted


@hookimpl
def graftwork_register_strategies() -> list[Strategy]:
    """Brings `lora`."""
    return [Lora()]


@hookimpl
def graftwork_identify_artifact(artifact: Artifact) -> str | None:
    """PEFT's configuration says what it is."""
    if CONFIG_FILE not in artifact.names():
        return None
    return Lora.id if artifact.json(CONFIG_FILE).get("peft_type") == "LORA" else None
