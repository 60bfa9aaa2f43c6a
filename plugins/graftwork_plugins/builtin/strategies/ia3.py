"""IA3 (arXiv:2205.05638) through PEFT: linear layers whose inputs or outputs are multiplied by a learned vector.

Training builds on PEFT; serving reads PEFT's files with an allow-list of its own and never runs PEFT on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from graftwork_plugins import (
    Artifact,
    ArtifactError,
    BaseInfo,
    BaseModelHandle,
    ConfigError,
    DatasetInfo,
    Delta,
    DeviceInfo,
    Estimate,
    Replace,
    SavedArtifact,
    Scale,
    Strategy,
    Trainable,
    TrainingConfig,
    activation_bytes,
    hookimpl,
)
from graftwork_plugins.peft_format.adapter_config import read_ia3_config
from graftwork_plugins.peft_format.files import (
    BASE_LAYER,
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    artifact_files,
    check_values,
    peft_type,
    read_tensors,
    saved_by_peft,
    unsupported,
)
from graftwork_plugins.peft_format.module_names import (
    linear_layer_endings,
    modules_named,
    no_linear_layer,
    no_such_module,
)
from graftwork_plugins.peft_format.patterns import MAX_NAMES
from graftwork_plugins.peft_format.saved_modules import replacements

if TYPE_CHECKING:
    import torch

_SUFFIX = ".ia3_l"
_INPUT_SCALED = ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h")
_OUTPUT_SCALED = ("k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")
"""Ends of the names of the layers that the paper scales: keys, values, and what leaves the feed-forward's middle."""


class Ia3Config(TrainingConfig):
    """Settings of IA3. The few numbers it trains bear a high learning rate."""

    learning_rate: float = Field(3e-3, gt=0, le=10, description="Peak learning rate of AdamW.")
    target_modules: list[str] = Field(
        default_factory=list,
        max_length=MAX_NAMES,
        description="Linear layers to scale, by full name or last parts of it; empty: keys, values and the last layer "
        "of each feed-forward block.",
    )
    feedforward_modules: list[str] = Field(
        default_factory=list,
        max_length=MAX_NAMES,
        description="Those of target_modules whose input is scaled instead of their output; empty: the last layers of "
        "feed-forward blocks.",
    )


class Ia3(Strategy):
    """Trains with PEFT; served as Scale deltas."""

    id = "ia3"
    version = "1.0"
    description = "IA3: learned factors on keys, values and feed-forward layers. Artifacts are PEFT's."
    artifact_files = artifact_files("IA3")
    Config = Ia3Config

    def validate(self, config: Ia3Config, base: BaseInfo) -> None:
        """Every name must match a linear layer of the base."""
        targets, inputs = _scaled_layers(config, base)
        if not targets:
            raise ConfigError(
                "target_modules", f"name the layers to scale; its linear layers end in {linear_layer_endings(base)}"
            )
        for field, names in (("target_modules", targets), ("feedforward_modules", inputs)):
            for name in names:
                if not modules_named([name], base.linear_modules):
                    raise no_linear_layer(field, name, base)
        for name in inputs:
            if name not in targets:
                raise ConfigError("feedforward_modules", f"feedforward_modules: {name!r} must be in target_modules too")

    def estimate(self, config: Ia3Config, base: BaseInfo, dataset: DatasetInfo, device: DeviceInfo) -> Estimate:
        """float32 factors with gradients and AdamW's two moments; activations, and a copy of each scaled input or
        output."""
        targets, inputs = _scaled_layers(config, base)
        sizes = [
            base.linear_modules[module][0 if module.endswith(tuple(inputs)) else 1]
            for module in modules_named(targets, base.linear_modules)
        ]
        tokens = config.micro_batch_tokens
        return Estimate(
            trained_parameters=sum(sizes),
            memory_bytes=16 * sum(sizes) + activation_bytes(base, tokens) + 2 * 4 * tokens * sum(sizes),
            artifact_bytes=4 * sum(sizes) + 200 * len(sizes) + 65_536,
        )

    def build(self, base: BaseModelHandle, config: Ia3Config) -> Trainable:
        """The base wrapped by PEFT, factors in float32, all of them 1."""
        import peft

        targets, inputs = _scaled_layers(config, base.info)
        peft_config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base.model, peft_config).eval()
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return Trainable(model, parameters)

    def save(self, trainable: Trainable) -> SavedArtifact:
        """What PEFT's save_pretrained writes: adapter_config.json and adapter_model.safetensors."""
        return saved_by_peft(trainable.model)

    def load(self, artifact: Artifact, base: BaseInfo) -> Sequence[Delta]:
        """Scale for each named layer, Replace for modules_to_save and for copies of the base's embeddings."""
        config = read_ia3_config(artifact.json(CONFIG_FILE))
        targets = config.targets(base)
        scales: dict[str, Scale] = {}
        copies: list[Replace] = []
        replaced: dict[str, dict[str, torch.Tensor]] = {}
        for full_name, tensor in read_tensors(artifact).items():
            name = full_name.removeprefix(PREFIX)
            check_values(full_name, tensor)
            module, _, leaf = name.rpartition(".")
            layer = module.removesuffix(BASE_LAYER)
            if name.endswith(_SUFFIX):
                module = name.removesuffix(_SUFFIX)
                scales[module] = _scale(full_name, module, tensor, config.scales_input(module), targets, base)
            elif name in base.parameters and config.is_saved_whole(module):
                replaced.setdefault(module, {})[leaf] = tensor
            elif leaf == "weight" and layer in (base.input_module, base.output_module, *base.tied_modules):
                copies.append(Replace(module=layer, tensors={leaf: tensor}, copy_of_base=True))
            else:
                accepted = f"accepted are {PREFIX}<linear layer>{_SUFFIX} and the parameters of modules_to_save"
                raise unsupported(full_name, accepted)
        for module in targets:
            if module in base.linear_modules and module not in scales and not config.is_saved_whole(module):
                raise ArtifactError(module, f"target_modules names {module}, but {WEIGHTS_FILE} has no {_SUFFIX}")
        return [*scales.values(), *copies, *replacements(replaced, config, base)]


def _scale(
    name: str, module: str, tensor: torch.Tensor, of_input: bool, targets: Sequence[str], base: BaseInfo
) -> Scale:
    if module not in base.linear_modules:
        raise no_such_module(name, module, base.linear_modules)
    if module not in targets:
        raise ArtifactError(
            name, f"{WEIGHTS_FILE} has {name}, but target_modules in {CONFIG_FILE} does not name its module"
        )
    in_features, out_features = base.linear_modules[module]
    wanted = [1, in_features] if of_input else [out_features, 1]
    if list(tensor.shape) != wanted:
        raise ArtifactError(
            name,
            f"tensor {name} has the shape {list(tensor.shape)}; with these feedforward_modules it must be {wanted}",
        )
    return Scale(module=module, factors=tensor.flatten(), of="input" if of_input else "output")


def _scaled_layers(config: Ia3Config, base: BaseInfo) -> tuple[list[str], list[str]]:
    """target_modules and feedforward_modules with the defaults filled in."""

    usual = [name for name in (*_OUTPUT_SCALED, *_INPUT_SCALED) if modules_named([name], base.linear_modules)]
    targets = config.target_modules or usual
    inputs = config.feedforward_modules or [name for name in targets if name.endswith(_INPUT_SCALED)]
    return targets, inputs


@hookimpl
def graftwork_register_strategies() -> list[Strategy]:
    """Brings `ia3`."""
    return [Ia3()]


@hookimpl
def graftwork_identify_artifact(artifact: Artifact) -> str | None:
    """PEFT's configuration says what it is."""
    return Ia3.id if peft_type(artifact) == "IA3" else None
