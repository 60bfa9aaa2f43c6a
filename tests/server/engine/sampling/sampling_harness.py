"""The pieces of the sampler as plain functions of logits."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from graftwork_server.engine.sampling import sampler
from graftwork_server.engine.scheduling.sequence import Sequence
from graftwork_server.wire.engine import TokenLogprobs


def sample(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[int | None]:
    """The next token of each sequence, None where none is allowed; logits [sequences, vocabulary] float32, changed."""
    ids, allowed = sampler.choose(logits, sequences)
    return [token if can else None for token, can in zip(ids.tolist(), allowed.tolist(), strict=True)]


def token_logprobs(logits: torch.Tensor, token_ids: SequenceOf[int], top: int) -> list[TokenLogprobs]:
    """Natural log probabilities of `token_ids` and of the `top` most likely tokens; logits [tokens, vocabulary]."""
    values = [tensor.numpy() for tensor in sampler.token_logprobs(logits, torch.tensor(token_ids), top)]
    return [sampler.entry(values, range(len(values)), row, token, top) for row, token in enumerate(token_ids)]
