"""What a request changes in its logits before a token is chosen: bias, penalties, forbidden tokens.

The order is transformers': bias, repetition penalty, then the additive penalties, then what is forbidden, by words and
by the form that the output must have. Work is done for the tokens concerned, of all sequences at once; a batch in which
nobody asks for anything costs nothing.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from graftwork_server.engine.sampling.grammars import Masks
from graftwork_server.engine.sampling.transfer import on_device, sent
from graftwork_server.wire.engine import Sampling

if TYPE_CHECKING:
    from llguidance import LLMatcher


class TokenCounts:
    """Each token of a sequence once, in order of its first coming, and how often the completion has it."""

    def __init__(self) -> None:
        self.ids = array("q")
        self.completion = array("f")
        self._position: dict[int, int] = {}
        self._taken = 0

    def update(self, tokens: SequenceOf[int], prompt_tokens: int, virtual_tokens: int = 0) -> None:
        """Takes the tokens that came since the last call; `tokens` is prompt and completion, the prompt with an
        adapter's virtual tokens, which are no words, at its beginning."""
        for index in range(max(self._taken, virtual_tokens), len(tokens)):
            token = tokens[index]
            position = self._position.setdefault(token, len(self.ids))
            if position == len(self.ids):
                self.ids.append(token)
                self.completion.append(0.0)
            if index >= prompt_tokens:
                self.completion[position] += 1.0
        self._taken = len(tokens)


class LogitsProcessing:
    """One sequence's share: what its request asks for, and the counts that its penalties need."""

    def __init__(self, sampling: Sampling, eos_token_ids: frozenset[int], matcher: LLMatcher | None = None) -> None:
        self.sampling = sampling
        self.matcher = matcher
        """Of its structured output; fed each token once it was chosen."""
        self.bias_ids = list(sampling.logit_bias)
        self.bias = list(sampling.logit_bias.values())
        penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
        self.counts = TokenCounts() if penalised else None
        self._ends = list(eos_token_ids | frozenset(sampling.stop_token_ids))
        self._never = [word[0] for word in sampling.bad_words if len(word) == 1]
        self._after: dict[int, list[list[int]]] = defaultdict(list)
        """Bad words of several tokens by the last token before the one that would complete them."""
        for word in sampling.bad_words:
            if len(word) > 1:
                self._after[word[-2]].append(word)

    @classmethod
    def of(
        cls, sampling: Sampling, eos_token_ids: frozenset[int], matcher: LLMatcher | None = None
    ) -> LogitsProcessing | None:
        """The processing that `sampling` asks for; None if it asks for nothing."""
        asks = (
            sampling.logit_bias
            or sampling.bad_words
            or sampling.min_tokens
            or sampling.repetition_penalty != 1
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or matcher is not None
        )
        return cls(sampling, eos_token_ids, matcher) if asks else None

    def forbidden(self, tokens: SequenceOf[int], generated: int) -> list[int]:
        """Tokens that must not come next."""
        ids = list(self._never)
        for word in self._after.get(tokens[-1], ()):
            if list(tokens[-len(word) + 1 :]) == word[:-1]:
                ids.append(word[-1])
        if generated < self.sampling.min_tokens:
            ids += self._ends
        return ids


@dataclass(frozen=True)
class ProcessedRow:
    """A row of logits whose sequence asks for changes, and what they depend on."""

    row: int
    processing: LogitsProcessing
    tokens: SequenceOf[int]
    """Prompt and completion, an adapter's virtual tokens at the beginning."""
    prompt_tokens: int
    """Virtual ones among them."""
    virtual_tokens: int = 0


def process_logits(logits: torch.Tensor, asking: SequenceOf[ProcessedRow], masks: Masks | None = None) -> None:
    """Changes the rows `asking` of logits [sequences, vocabulary] float32 in place.

    `masks` is needed where one has a matcher.
    A row may end with every logit -inf, where what is forbidden leaves nothing.
    """
    _add_bias(logits, asking)
    _penalise(logits, [entry for entry in asking if entry.processing.counts is not None])
    rows: list[int] = []
    ids: list[int] = []
    for entry in asking:
        generated = len(entry.tokens) - entry.prompt_tokens
        # A tokenizer may have tokens that the model has no logit for: they do not come anyway.
        forbidden = [id for id in entry.processing.forbidden(entry.tokens, generated) if id < logits.shape[1]]
        rows += [entry.row] * len(forbidden)
        ids += forbidden
    if ids:
        at = on_device([rows, ids], torch.int64, logits.device)
        logits[at[0], at[1]] = float("-inf")
    matching = [(entry.row, entry.processing.matcher) for entry in asking if entry.processing.matcher is not None]
    if matching and masks is not None:
        masks.apply(logits, [row for row, _ in matching], [matcher for _, matcher in matching])


def _add_bias(logits: torch.Tensor, asking: SequenceOf[ProcessedRow]) -> None:
    rows = [entry.row for entry in asking for _ in entry.processing.bias_ids]
    if not rows:
        return
    ids = [token for entry in asking for token in entry.processing.bias_ids]
    bias = [value for entry in asking for value in entry.processing.bias]
    at = on_device([rows, ids], torch.int64, logits.device)
    logits[at[0], at[1]] += on_device(bias, torch.float32, logits.device)


def _penalise(logits: torch.Tensor, asking: SequenceOf[ProcessedRow]) -> None:
    """Repetition penalty (arXiv:1909.05858), then presence and frequency as OpenAI's API defines them."""
    if not asking:
        return
    ids, counts, lengths = [], [], []
    for entry in asking:
        seen = entry.processing.counts
        assert seen is not None  # the caller chose them by it
        seen.update(entry.tokens, entry.prompt_tokens, entry.virtual_tokens)
        ids.append(np.array(seen.ids))
        counts.append(np.array(seen.completion))
        lengths.append(len(ids[-1]))
    # One entry for each different token of each sequence.
    per_sequence = np.array(
        [
            (row, sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
            for row, sampling in ((entry.row, entry.processing.sampling) for entry in asking)
        ],
        dtype=np.float32,
    )
    rows, repetition, presence, frequency = (
        sent(torch.from_numpy(np.repeat(column, lengths)), logits.device) for column in per_sequence.T
    )
    at = (rows.long(), sent(torch.from_numpy(np.concatenate(ids)), logits.device))
    count = sent(torch.from_numpy(np.concatenate(counts)), logits.device)
    values = logits[at]
    values = torch.where(values < 0, values * repetition, values / repetition)
    logits[at] = values - (presence * (count > 0) + frequency * count)
