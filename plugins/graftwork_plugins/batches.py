"""What a training batch is: rows packed one after another, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
"""Label of a token that carries no loss."""


@dataclass(frozen=True)
class TrainingRow:
    """One row of a data set, tokenised."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    """As long as input_ids: the token itself where it carries loss, IGNORED_LABEL elsewhere. Not shifted."""


@dataclass(frozen=True)
class PackedBatch:
    """Rows laid one after another; attention never crosses from one to the next.

    All tensors are on the training device.
    """

    input_ids: torch.Tensor
    """[1, tokens] int64"""
    position_ids: torch.Tensor
    """[1, tokens] int64, from 0 within each row"""
    labels: torch.Tensor
    """[1, tokens] int64, not shifted; the first token of each row has IGNORED_LABEL, since nothing precedes it"""
    cu_seqlens: Sequence[int]
    """[rows + 1] offsets of the rows, the first 0, the last the number of tokens"""

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self.input_ids.shape[1])
