"""From a step's logits and states to tokens, log probabilities and vectors on the host: one wait for the device."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from graftwork_server.engine.sampling.draw import draw
from graftwork_server.engine.sampling.grammars import Masks
from graftwork_server.engine.sampling.logits_processing import process_logits
from graftwork_server.engine.sampling.pooling import pooled, vectors
from graftwork_server.engine.sampling.transfer import Array, Readback, on_device
from graftwork_server.engine.scheduling.sequence import ChunkLogits, Sampled, ScheduledChunk, Sequence
from graftwork_server.layers.head import BoundHead
from graftwork_server.wire.engine import TokenLogprobs


class Sampler:
    """Samples the next token of each sequence, and reads what else the sequences ask for."""

    def __init__(self, base_head: BoundHead | None) -> None:
        """base_head: of a base that is a classifier."""
        self._base_head = base_head
        self._masks = Masks()

    def sample(self, results: SequenceOf[ChunkLogits]) -> list[Sampled]:
        """Of each chunk, in order. A sequence draws one number from its own stream for each token, so what else is in
        the batch changes nothing."""
        readback = Readback()
        finite = [readback.add(result.finite) for result in results]
        scored = [_prompt_logprobs(result, readback) for result in results]
        sampling = [index for index, result in enumerate(results) if result.chunk.samples_token]
        tokens, allowed, logprobs = self._next_tokens([results[index] for index in sampling], readback)
        ending = [index for index, result in enumerate(results) if result.chunk.pools]
        states = [results[index].chunk.sequence for index in ending]
        pooling = [readback.add(vector) for vector in vectors(states, self._base_head)]
        values = readback.read()

        sampled = [Sampled(result.chunk, bool(values[at])) for result, at in zip(results, finite, strict=True)]
        for one, places in zip(sampled, scored, strict=True):
            one.prompt_logprobs = _scored(one.chunk, values, places)
        for row, index in enumerate(sampling):
            one, top = sampled[index], results[index].chunk.sequence.request.sampling.logprobs
            one.token = int(values[tokens][row]) if values[allowed][row] else None
            if top is not None and one.token is not None:
                one.logprobs = [entry(values, logprobs, row, one.token, top)]
        for index, at in zip(ending, pooling, strict=True):
            one = sampled[index]
            one.pooled, is_finite = pooled(one.chunk.sequence, self._base_head, values[at])
            one.finite = one.finite and is_finite
        return sampled

    def _next_tokens(self, results: SequenceOf[ChunkLogits], readback: Readback) -> tuple[int, int, tuple[int, ...]]:
        """Where the tokens, whether they are allowed, and their log probabilities will be found."""
        if not results:
            return 0, 0, ()
        sequences = [result.chunk.sequence for result in results]
        logits = torch.stack([result.logits[-1] for result in results])  # [sequences, vocabulary]
        asked = [sequence.request.sampling.logprobs for sequence in sequences]
        most = max((top for top in asked if top is not None), default=None)
        # choose changes what it is given.
        ids, allowed = choose(logits if most is None else logits.clone(), sequences, self._masks)
        logprobs: tuple[int, ...] = ()
        if most is not None:
            logprobs = tuple(readback.add(tensor) for tensor in token_logprobs(logits, ids, most))
        return readback.add(ids), readback.add(allowed), logprobs


def choose(
    logits: torch.Tensor, sequences: SequenceOf[Sequence], masks: Masks | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each sequence, [sequences] int64, and whether there is one that is allowed, [sequences] bool;
    logits [sequences, vocabulary] float32, changed."""
    processed = [row for index, sequence in enumerate(sequences) if (row := sequence.processed_row(index)) is not None]
    process_logits(logits, processed, masks)
    ids = _argmax(logits)
    allowed = logits.gather(1, ids[:, None])[:, 0].isfinite() if processed else torch.ones_like(ids, dtype=torch.bool)
    drawing = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.temperature > 0]
    if drawing:
        us = [sequences[row].random.random() for row in drawing]
        drawn = draw(logits, drawing, [sequences[row].request.sampling for row in drawing], us)
        ids[on_device(drawing, torch.int64, logits.device)] = drawn
    return ids, allowed


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """[rows] int64; of equal ones the first."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))  # torch's own takes eight times as long
    return logits.argmax(-1)


# ---------------------------------------------------------------------------------------------- log probabilities


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor, top: int) -> tuple[torch.Tensor, ...]:
    """Natural log probabilities of ids [tokens], and of the `top` most likely tokens with their ids [tokens, top];
    logits [tokens, vocabulary]."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, ids[:, None])[:, 0]
    if top == 0:
        return (chosen,)
    values, best = logprobs.topk(min(top, logits.shape[-1]), dim=-1)
    return chosen, values, best


def entry(values: SequenceOf[Array], at: SequenceOf[int], row: int, token: int, top: int) -> TokenLogprobs:
    """A token's log probability, and those of the `top` most likely ones; `at` is where token_logprobs' tensors are."""
    chosen = float(values[at[0]][row])
    if top == 0:
        return TokenLogprobs(token, chosen)
    likely, ids = (values[index][row, :top].tolist() for index in at[1:])
    return TokenLogprobs(token, chosen, [(int(id), value) for id, value in zip(ids, likely, strict=True)])


def _prompt_logprobs(result: ChunkLogits, readback: Readback) -> tuple[int, ...]:
    """Where the log probabilities of a chunk's part of the prompt will be found."""
    targets = _targets(result.chunk)
    if not targets:
        return ()
    ids = on_device(targets, torch.int64, result.logits.device)
    top = result.chunk.sequence.request.prompt_logprobs or 0
    return tuple(readback.add(tensor) for tensor in token_logprobs(result.logits[: len(targets)], ids, top))


def _targets(chunk: ScheduledChunk) -> list[int]:
    """The tokens that the rows of a chunk predict, if its sequence wants their log probabilities."""
    sequence = chunk.sequence
    start, end = max(chunk.start, sequence.virtual_tokens), chunk.start + chunk.count
    return sequence.tokens[start + 1 : end + 1] if sequence.wants_prompt_logprobs and start < end else []


def _scored(chunk: ScheduledChunk, values: SequenceOf[Array], at: SequenceOf[int]) -> list[TokenLogprobs]:
    """Row i of a chunk predicts the token after it; the prompt's first token is predicted by nothing."""
    sequence, first = chunk.sequence, chunk.sequence.virtual_tokens
    entries = []
    if sequence.wants_prompt_logprobs and chunk.start <= first < chunk.start + chunk.count:
        entries.append(TokenLogprobs(sequence.tokens[first], None))
    top = sequence.request.prompt_logprobs or 0
    return entries + [entry(values, at, row, token, top) for row, token in enumerate(_targets(chunk))]
