"""Choosing the next token of each sequence from its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import torch

from graftwork_server.engine.sampling.grammars import Masks
from graftwork_server.engine.sampling.logits_processing import process_logits
from graftwork_server.engine.scheduling.sequence import Sequence
from graftwork_server.wire.engine import Sampling, TokenLogprobs

_FIRST_CANDIDATES = 1024
"""Most likely tokens looked at before a nucleus is searched in the whole vocabulary."""


def sample(logits: torch.Tensor, sequences: SequenceOf[Sequence], masks: Masks | None = None) -> list[int | None]:
    """The next token of each sequence, None where none is allowed; logits [sequences, vocabulary] float32, changed.

    A sequence draws one number from its own stream for each token, so what else is in the batch changes nothing.
    """
    processed = [row for index, sequence in enumerate(sequences) if (row := sequence.processed_row(index)) is not None]
    process_logits(logits, processed, masks)
    greedy = logits.argmax(-1).tolist()
    possible = torch.isfinite(logits.amax(-1)).tolist() if processed else [True] * len(greedy)
    tokens: list[int | None] = []
    for token, can, row, sequence in zip(greedy, possible, logits, sequences, strict=True):
        sampling = sequence.request.sampling
        if not can:
            tokens.append(None)
        elif sampling.temperature == 0:
            tokens.append(token)
        else:
            tokens.append(_draw(row, sampling, sequence.random.random()))
    return tokens


def _draw(logits: torch.Tensor, sampling: Sampling, u: float) -> int:
    """Inverse transform sampling with u in [0, 1) from logits [vocabulary], most likely tokens first where cut."""
    # Shifted to a maximum of 0 first: dividing by a tiny temperature then gives -inf, never inf - inf.
    scaled = (logits - logits.max()) / max(sampling.temperature, 1e-6)
    if sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p == 0 and sampling.typical_p >= 1:
        cumulative = scaled.double().softmax(-1).cumsum(-1)
        return _inverse(cumulative, u)
    ids, probabilities = _most_likely(scaled, sampling)
    if sampling.typical_p < 1:
        kept = _typical(probabilities / probabilities.sum(), sampling.typical_p)
        ids, probabilities = ids[kept], probabilities[kept]
    return int(ids[_inverse(probabilities.cumsum(-1), u)])


def _most_likely(scaled: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and probabilities that top_k, top_p and min_p leave, best first; scaled [vocabulary] has a maximum of 0."""
    vocabulary = scaled.shape[-1]
    limit = min(sampling.top_k or vocabulary, vocabulary)
    cuts_tail = sampling.top_p < 1 or sampling.min_p > 0
    candidates = min(limit, _FIRST_CANDIDATES) if cuts_tail and not sampling.top_k else limit
    normaliser = scaled.double().logsumexp(-1)
    # min_p is a share of the greatest probability, and that one's logit is 0 (arXiv:2407.01082).
    least = math.log(sampling.min_p) if sampling.min_p else -math.inf
    while True:
        values, ids = scaled.topk(candidates)
        probabilities = (values.double() - normaliser).exp()
        if sampling.top_k:
            probabilities /= probabilities.sum()
        cumulative = probabilities.cumsum(-1)
        if candidates == limit or cumulative[-1] >= sampling.top_p or values[-1] < least:
            break
        candidates = limit
    kept = candidates
    if sampling.top_p < 1:
        # The nucleus is the smallest set of most likely tokens whose mass reaches top_p (arXiv:1904.09751).
        kept = min(kept, int(torch.searchsorted(cumulative, sampling.top_p).item()) + 1)
    if sampling.min_p:
        kept = min(kept, int((values >= least).sum()))
    return ids[:kept], probabilities[:kept]


def _typical(probabilities: torch.Tensor, mass: float) -> torch.Tensor:
    """Positions of the tokens whose information is nearest to the entropy, up to `mass` (arXiv:2202.00666)."""
    information = -probabilities.log()
    entropy = (probabilities * information).nansum()
    distance, order = (information - entropy).abs().sort(stable=True)
    last = min(int((probabilities[order].cumsum(-1) < mass).sum()), len(order) - 1)
    return order[distance <= distance[last]]


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
