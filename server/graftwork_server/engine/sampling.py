"""Choosing the next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from graftwork_server.engine.sequence import Sequence
from graftwork_server.messages import Sampling, TokenLogprobs

_FIRST_CANDIDATES = 1024
"""Most likely tokens looked at before a nucleus is searched in the whole vocabulary."""


def sample(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[int]:
    """The next token of each sequence; logits [sequences, vocabulary] float32.

    A sequence draws one number from its own stream for each token, so what else is in the batch changes nothing.
    """
    greedy = logits.argmax(-1).tolist()
    return [
        token
        if sequence.request.sampling.temperature == 0
        else _draw(row, sequence.request.sampling, sequence.random.random())
        for token, row, sequence in zip(greedy, logits, sequences, strict=True)
    ]


def _draw(logits: torch.Tensor, sampling: Sampling, u: float) -> int:
    """Inverse transform sampling with u in [0, 1) from logits [vocabulary], most likely tokens first where cut."""
    # Shifted to a maximum of 0 first: dividing by a tiny temperature then gives -inf, never inf - inf.
    scaled = (logits - logits.max()) / max(sampling.temperature, 1e-6)
    if sampling.top_k == 0 and sampling.top_p >= 1:
        cumulative = scaled.double().softmax(-1).cumsum(-1)
        return _inverse(cumulative, u)
    vocabulary = scaled.shape[-1]
    limit = sampling.top_k or vocabulary
    candidates = min(limit, vocabulary, sampling.top_k or _FIRST_CANDIDATES)
    normaliser = scaled.double().logsumexp(-1)
    while True:
        values, ids = scaled.topk(candidates)
        probabilities = (values.double() - normaliser).exp()
        if sampling.top_k:
            probabilities /= probabilities.sum()
        cumulative = probabilities.cumsum(-1)
        if candidates >= min(limit, vocabulary) or cumulative[-1] >= sampling.top_p:
            break
        candidates = vocabulary
    # The nucleus is the smallest set of most likely tokens whose mass reaches top_p (arXiv:1904.09751).
    kept = int(torch.searchsorted(cumulative, sampling.top_p).item()) + 1
    return int(ids[_inverse(cumulative[:kept], u)])


def _inverse(cumulative: torch.Tensor, u: float) -> int:
    position = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True).item())
    return min(position, cumulative.shape[0] - 1)


def token_logprobs(logits: torch.Tensor, token_ids: SequenceOf[int], top: int) -> list[TokenLogprobs]:
    """Natural log probabilities of `token_ids` and of the `top` most likely tokens; logits [tokens, vocabulary]."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    if top == 0:
        return [TokenLogprobs(token, value) for token, value in zip(token_ids, chosen, strict=True)]
    values, ids = logprobs.topk(min(top, logits.shape[-1]), dim=-1)
    return [
        TokenLogprobs(token, value, list(zip(row_ids, row_values, strict=True)))
        for token, value, row_ids, row_values in zip(token_ids, chosen, ids.tolist(), values.tolist(), strict=True)
    ]
