"""QLoRA (arXiv:2305.14314): LoRA on a base whose linear layers are quantised.

The updates learn to make up for the rounding, too. What comes out is a PEFT adapter as `lora` makes one; `lora` itself
trains on a quantised base in the same way. This strategy refuses any other, and has the paper's settings.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graftwork_plugins import Automatic, BaseInfo, Strategy, UnsupportedBase, hookimpl
from graftwork_plugins.builtin.strategies.lora import Lora, LoraConfig, lora_rate


class QloraConfig(LoraConfig):
    """Settings of QLoRA: those of LoRA. Defaults after the paper's appendix B.2, for models up to 13B."""

    learning_rate: Annotated[float, Automatic(lora_rate)] = Field(
        2e-4, gt=0, le=10, description="Peak learning rate of AdamW; left open: by the model's width and lora_alpha."
    )
    r: int = Field(64, ge=1, le=1024, description="Rank of the updates.")
    lora_alpha: float = Field(16, gt=0, le=65_536, description="The updates are scaled by lora_alpha / r.")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the updates' input while training.")
    max_grad_norm: float = Field(0.3, ge=0, description="Gradients are scaled down to this norm; 0: they are not.")


class Qlora(Lora):
    """Trains with PEFT on quantised layers; served as LowRank deltas."""

    id = "qlora"
    version = "1.0"
    description = "QLoRA: LoRA on a base that is served quantised (--quantization nf4 or int8). Artifacts are PEFT's."
    artifact_files = ""  # a PEFT adapter is recognised by `lora`
    Config = QloraConfig

    def validate(self, config: LoraConfig, base: BaseInfo) -> None:
        """See Lora. Raises UnsupportedBase for a base that is not quantised."""
        if base.quantization == "none":
            raise UnsupportedBase(
                "qlora trains on a quantised base, and this one is not: start the server with --quantization nf4, or "
                "use lora, which trains on the resident weights as they are without a copy of them"
            )
        super().validate(config, base)


@hookimpl
def graftwork_register_strategies() -> list[Strategy]:
    """Brings `qlora`."""
    return [Qlora()]
