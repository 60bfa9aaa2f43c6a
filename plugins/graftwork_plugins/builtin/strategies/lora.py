"""LoRA (arXiv:2106.09685) through PEFT: low-rank updates of linear layers, saved in PEFT's own format.

Training builds on PEFT. Serving reads adapter_config.json with an allow-list of its own, makes deltas of the tensors
(both in peft_format/), and never runs PEFT on what a client sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from graftwork_plugins import (
    Artifact,
    Automatic,
    BaseInfo,
    BaseModelHandle,
    Choice,
    ConfigError,
    DatasetInfo,
    Delta,
    DeviceInfo,
    Estimate,
    SavedArtifact,
    Strategy,
    Trainable,
    TrainingConfig,
    activation_bytes,
    hookimpl,
)
from graftwork_plugins.builtin.learning_rates import full_rate, model_width
from graftwork_plugins.peft_format.adapter_config import LoraPatterns, read_lora_config
from graftwork_plugins.peft_format.files import CONFIG_FILE, artifact_files, peft_type, saved_by_peft
from graftwork_plugins.peft_format.lora_tasks import task_deltas
from graftwork_plugins.peft_format.module_names import modules_named, no_linear_layer
from graftwork_plugins.peft_format.patterns import MAX_NAMES, PatternError, PatternMatcher


def lora_rate(config: LoraConfig, base: BaseInfo) -> Choice:
    """Ten times full tuning's rate, which does not depend on the rank as long as lora_alpha is 32 ("LoRA Without
    Regret"); what scales the updates more or less has to be made up for, since AdamW's steps do not follow it."""
    alpha = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1)
    rate = _ADAPTER_FACTOR * full_rate(base) * _USUAL_ALPHA / alpha
    scale = "lora_alpha" if not config.use_rslora else "lora_alpha * sqrt(r)"
    return Choice(
        float(f"{min(rate, _HIGHEST_RATE):.2g}"),
        f"{_ADAPTER_FACTOR} times full tuning's rate for a model of width {model_width(base)}, times {_USUAL_ALPHA:g} "
        f"over {scale} ({alpha:g}); the rank changes nothing else",
    )


_ADAPTER_FACTOR, _USUAL_ALPHA, _HIGHEST_RATE = 10, 32.0, 2e-2


class LoraConfig(TrainingConfig):
    """Settings of LoRA. Defaults after "LoRA Without Regret": every linear layer, ten times full tuning's learning
    rate whatever the rank, small batches."""

    learning_rate: Annotated[float, Automatic(lora_rate)] = Field(
        5e-4, gt=0, le=10, description="Peak learning rate of AdamW; left open: by the model's width and lora_alpha."
    )
    r: int = Field(16, ge=1, le=1024, description="Rank of the updates.")
    lora_alpha: float = Field(32, gt=0, le=65_536, description="The updates are scaled by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the updates' input while training.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732).")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(max_length=MAX_NAMES)] = Field(
        "all-linear",
        examples=[["q_proj", "v_proj"]],
        description="Linear layers to update, by full name or last parts of it; all-linear: all but the output layer.",
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict,
        max_length=MAX_NAMES,
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
    artifact_files = artifact_files("LORA")
    Config = LoraConfig

    def validate(self, config: LoraConfig, base: BaseInfo) -> None:
        """Every name and pattern must match a linear layer of the base; ranks and alphas must be positive."""
        if not config.target_modules:
            raise ConfigError("target_modules", "target_modules is empty; name linear layers, or say all-linear")
        for target in config.target_modules if isinstance(config.target_modules, list) else []:
            if not modules_named([target], base.linear_modules):
                raise no_linear_layer("target_modules", target, base)
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
                        raise no_linear_layer(field, key, base)
                except PatternError as error:
                    raise ConfigError(field, f"{field}: {error}") from None

    def estimate(self, config: LoraConfig, base: BaseInfo, dataset: DatasetInfo, device: DeviceInfo) -> Estimate:
        """float32 updates with gradients and AdamW's two moments; activations, and PEFT's float32 copy of each
        adapted layer's input, its product with A, and its update; one quantised layer's weight, twice."""
        patterns = LoraPatterns(config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern, False)
        targets = _targets(config, base)
        ranks = {target: patterns.rank(target) for target in targets}
        trained = sum(ranks[target] * sum(base.linear_modules[target]) for target in targets)
        updates = sum(sum(base.linear_modules[target]) + 2 * ranks[target] for target in targets)
        tokens = config.micro_batch_tokens
        largest = max((i * o for i, o in base.linear_modules.values()), default=0) if base.quantization != "none" else 0
        return Estimate(
            trained_parameters=trained,
            memory_bytes=16 * trained + activation_bytes(base, tokens) + 4 * tokens * updates + 2 * 4 * largest,
            artifact_bytes=4 * trained + 300 * len(targets) + 65_536,
        )

    def build(self, base: BaseModelHandle, config: LoraConfig) -> Trainable:
        """The base wrapped by PEFT, updates in float32, dropout on for the updates alone."""
        import peft

        peft_config = peft.LoraConfig(
            r=config.r,
            lora_alpha=_as_peft_writes(config.lora_alpha),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            # By name: for a mixture of experts, PEFT takes "all-linear" to mean the experts' stacked parameters too.
            target_modules=_targets(config, base.info) if _has_stacked_experts(base.info) else config.target_modules,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern={name: _as_peft_writes(alpha) for name, alpha in config.alpha_pattern.items()},
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(base.model, peft_config).eval()
        for name, module in model.named_modules():
            module.training = ".lora_dropout." in name
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return Trainable(model, parameters)

    def save(self, trainable: Trainable) -> SavedArtifact:
        """What PEFT's save_pretrained writes: adapter_config.json and adapter_model.safetensors."""
        return saved_by_peft(trainable.model)

    def load(self, artifact: Artifact, base: BaseInfo) -> Sequence[Delta]:
        """LowRank for each adapted module, Replace for what is saved whole, Head for a classifier."""
        return task_deltas(artifact, read_lora_config(artifact.json(CONFIG_FILE)), base)


def _targets(config: LoraConfig, base: BaseInfo) -> list[str]:
    if isinstance(config.target_modules, list):
        return modules_named(config.target_modules, base.linear_modules)
    return [name for name in base.linear_modules if name != base.output_module]


def _has_stacked_experts(base: BaseInfo) -> bool:
    return any(len(shape) == 3 for shape in base.parameters.values())


def _as_peft_writes(alpha: float) -> Any:
    """PEFT declares alpha an int, computes with any number, and writes it down as it is given."""
    return int(alpha) if alpha == int(alpha) else alpha


@hookimpl
def graftwork_register_strategies() -> list[Strategy]:
    """Brings `lora`."""
    return [Lora()]


@hookimpl
def graftwork_identify_artifact(artifact: Artifact) -> str | None:
    """PEFT's configuration says what it is."""
    return Lora.id if peft_type(artifact) == "LORA" else None
