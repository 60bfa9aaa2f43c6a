"""Drawing the next token of each row of a batch: temperature, top-k, top-p, min-p, typical, then inverse transform
sampling. On a GPU nothing here waits for it; a row's token depends on its own request alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from graftwork_server.engine.sampling.transfer import on_device
from graftwork_server.wire.engine import Sampling

_FIRST_CANDIDATES = 1024
"""On the CPU: most likely tokens looked at before a nucleus is searched in the whole vocabulary."""


class Cuts(NamedTuple):
    """What is done to some rows: how many of their most likely tokens are looked at (0: all, uncut), and what cuts."""

    candidates: int
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    typical: bool = False


class Parameters(NamedTuple):
    """Of rows, [rows, 1] float64 each; of a single one, plain numbers."""

    temperature: torch.Tensor | float
    u: torch.Tensor | float
    """The random number, in [0, 1)."""
    top_k: torch.Tensor | float
    top_p: torch.Tensor | float
    least: torch.Tensor | float
    """min_p as a logarithm."""
    typical_p: torch.Tensor | float


def draw(
    logits: torch.Tensor, rows: SequenceOf[int], asked: SequenceOf[Sampling], us: SequenceOf[float]
) -> torch.Tensor:
    """Of some rows of logits [sequences, vocabulary] float32: ids [rows] int64. us: of each, a number in [0, 1)."""
    vocabulary = logits.shape[-1]
    parameters = [
        Parameters(
            max(s.temperature, 1e-6), u, s.top_k, s.top_p, math.log(s.min_p) if s.min_p else -math.inf, s.typical_p
        )
        for s, u in zip(asked, us, strict=True)
    ]
    cuts = [_cuts(sampling, vocabulary) for sampling in asked]
    if _is_host(logits):
        # One by one: what is made of a row stays in the processor's cache, and takes no new pages.
        one_by_one = zip(rows, parameters, cuts, strict=True)
        return torch.cat([_drawn(logits[row : row + 1], of_row, cut) for row, of_row, cut in one_by_one])
    ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for is_cut in (False, True):
        chosen = [index for index, cut in enumerate(cuts) if bool(cut.candidates) == is_cut]
        if not chosen:
            continue
        # How many candidates are enough would have to be waited for, so all are looked at.
        flags = [any(cuts[index][flag] for index in chosen) for flag in range(1, len(Cuts._fields))]
        table = on_device([parameters[index] for index in chosen], torch.float64, logits.device)
        at, target = on_device([[rows[index] for index in chosen], chosen], torch.int64, logits.device)
        of_rows = Cuts(vocabulary if is_cut else 0, *flags)
        ids[target] = _drawn(logits[at], Parameters(*table.split(1, dim=1)), of_rows)
    return ids


def _is_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _cuts(sampling: Sampling, vocabulary: int) -> Cuts:
    """By the row's own request alone: how ties are broken depends on the number of candidates."""
    top_p, min_p, typical = sampling.top_p < 1, sampling.min_p > 0, sampling.typical_p < 1
    if not (sampling.top_k or top_p or min_p or typical):
        return Cuts(0)
    candidates = sampling.top_k or (_FIRST_CANDIDATES if top_p or min_p else vocabulary)
    return Cuts(min(candidates, vocabulary), bool(sampling.top_k), top_p, min_p, typical)


def _drawn(logits: torch.Tensor, parameters: Parameters, cuts: Cuts) -> torch.Tensor:
    """Ids [rows] from logits [rows, vocabulary]."""
    temperature, u = parameters.temperature, parameters.u
    # Shifted to a maximum of 0 first: dividing by a tiny temperature then gives -inf, never inf - inf.
    scaled = ((logits - logits.amax(-1, keepdim=True)) / temperature).float()
    if not cuts.candidates:
        return _inverse(scaled.double().softmax(-1).cumsum(-1), u)
    normaliser = scaled.double().logsumexp(-1, keepdim=True)
    values, ids = _most_likely(scaled, cuts.candidates)
    probabilities = (values.double() - normaliser).exp()  # [rows, candidates]
    # On the CPU, where there is one row, and nobody waits.
    if cuts.candidates < scaled.shape[-1] and not cuts.top_k:
        is_enough = float(probabilities.sum()) >= parameters.top_p or float(values[0, -1]) < parameters.least
        if not is_enough:
            values, ids = _most_likely(scaled, scaled.shape[-1])
            probabilities = (values.double() - normaliser).exp()
    ids, probabilities = _cut(ids, values, probabilities, parameters, cuts)
    chosen = _inverse(probabilities.cumsum(-1), u)
    return ids.gather(1, chosen[:, None])[:, 0]


def _cut(
    ids: torch.Tensor, values: torch.Tensor, probabilities: torch.Tensor, parameters: Parameters, cuts: Cuts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the candidates [rows, candidates], and their probabilities: 0 for those that are cut."""
    top_k, top_p = parameters.top_k, parameters.top_p
    kept = torch.ones_like(values, dtype=torch.bool)
    position = torch.arange(ids.shape[1], device=ids.device)
    if cuts.top_k and isinstance(top_k, torch.Tensor):
        kept = (position < top_k) | (top_k == 0)
        probabilities = torch.where(kept, probabilities, 0.0)
        probabilities = probabilities / torch.where(top_k > 0, probabilities.sum(-1, keepdim=True), 1.0)
    elif cuts.top_k:  # there are no other candidates
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if cuts.top_p:
        # The nucleus is the smallest set of most likely tokens whose mass reaches top_p (arXiv:1904.09751).
        before = (probabilities.cumsum(-1) < top_p).sum(-1, keepdim=True)
        kept = kept & ((position <= before) | (top_p >= 1))
    if cuts.min_p:
        # min_p is a share of the greatest probability, and that one's logit is 0 (arXiv:2407.01082).
        kept = kept & (values >= parameters.least)
    if cuts.top_p or cuts.min_p:
        probabilities = torch.where(kept, probabilities, 0.0)
    return _typical(ids, probabilities, kept, parameters.typical_p) if cuts.typical else (ids, probabilities)


def _most_likely(scaled: torch.Tensor, candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids [rows, candidates], best first."""
    if _is_host(scaled):
        return scaled.topk(candidates)
    # topk breaks ties by what else is in the batch; a stable sort by id.
    values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    return values[:, :candidates], ids[:, :candidates]


def _typical(
    ids: torch.Tensor, probabilities: torch.Tensor, kept: torch.Tensor, mass: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where mass < 1, the tokens whose information is nearest to the entropy, nearest first, up to `mass`
    (arXiv:2202.00666)."""
    normalised = probabilities / probabilities.sum(-1, keepdim=True)
    information = -normalised.log()
    entropy = torch.where(normalised > 0, normalised * information, 0.0).sum(-1, keepdim=True)
    distance = torch.where(kept, (information - entropy).abs(), torch.inf)
    distance, order = distance.sort(dim=-1, stable=True)
    before = (normalised.gather(1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    last = torch.minimum(before, kept.sum(-1, keepdim=True) - 1)
    typical = torch.where(distance <= distance.gather(1, last), probabilities.gather(1, order), 0.0)
    if not isinstance(mass, torch.Tensor):
        return ids.gather(1, order), typical
    return torch.where(mass < 1, ids.gather(1, order), ids), torch.where(mass < 1, typical, probabilities)


def _inverse(cumulative: torch.Tensor, u: torch.Tensor | float) -> torch.Tensor:
    """Positions [rows] where cumulative [rows, n] passes the share u of its end."""
    position = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
    return position.clamp(max=cumulative.shape[1] - 1)
