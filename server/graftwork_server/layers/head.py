"""Classification heads: a few small layers over one hidden state of each sequence, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from graftwork_server.wire.engine import HeadInfo

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
}


@dataclass(frozen=True)
class BoundHead:
    """A head on the device; all tensors float32."""

    info: HeadInfo
    pooling: str
    """"mean", "cls", or "last": the last token that is not `pad_token_id`."""
    pad_token_id: int | None
    weight: torch.Tensor
    """[labels, features]"""
    bias: torch.Tensor | None
    """[labels]"""
    dense_module: str | None = None
    """Linear layer of the base that comes before, run with the adapter's own updates."""
    dense_weight: torch.Tensor | None = None
    """[features, hidden]: a layer of its own that comes before."""
    dense_bias: torch.Tensor | None = None
    """[features]"""
    activation: str = "tanh"

    @property
    def parameter_count(self) -> int:
        """Numbers in its tensors."""
        return sum(tensor.numel() for tensor in self._tensors())

    @property
    def device_bytes(self) -> int:
        """What its tensors take on the device."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """states [n, hidden] float32, or what `dense_module` made of them -> logits [n, labels]."""
        if self.dense_weight is not None:
            states = torch.nn.functional.linear(states, self.dense_weight, self.dense_bias)
        if self.dense_weight is not None or self.dense_module is not None:
            states = _ACTIVATIONS[self.activation](states)
        return torch.nn.functional.linear(states, self.weight, self.bias)

    def _tensors(self) -> list[torch.Tensor]:
        tensors = (self.weight, self.bias, self.dense_weight, self.dense_bias)
        return [tensor for tensor in tensors if tensor is not None]
