"""From a sequence's outputs to the messages of a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from graftwork.v1 import generation_pb2 as pb
from graftwork_server.hub.resolver import Resolved
from graftwork_server.text import IncrementalDetokenizer
from graftwork_server.wire.engine import Sampling, SequenceOutput, TokenLogprobs

FINISH_REASONS = {"": 0, "stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class Completion:
    """Makes the messages of one completion: text, tokens, and at its ends who answers.

    response_type: GenerateResponse or ChatResponse. echo: text that comes before the completion's own. scored: its last
    message says the mean log probability of its tokens, which the engine must then send.
    """

    def __init__(
        self,
        response_type: type[Any],
        resolved: Resolved,
        sampling: Sampling,
        logprob: Callable[[TokenLogprobs], pb.TokenLogprob],
        detokenizer: IncrementalDetokenizer | None,
        *,
        index: int = 0,
        echo: str = "",
        has_stops: bool = False,
        shows_logprobs: bool = False,
        scored: bool = False,
    ) -> None:
        self._response_type = response_type
        self._resolved = resolved
        self._sampling = sampling
        self.logprob = logprob
        self._detokenizer = detokenizer
        self._index = index
        self._echo = echo
        self._has_stops = has_stops
        self._shows_logprobs = shows_logprobs
        self._scored = scored
        self._logprob_sum = 0.0
        self._begun = False
        self.ended = False
        """A message had a finish reason; nothing more belongs to this completion."""
        self.tokens = 0
        """Tokens so far."""

    @property
    def score(self) -> float:
        """Mean log probability of the tokens so far, under the model's own distribution."""
        return self._logprob_sum / max(self.tokens, 1)

    def message(self, output: SequenceOutput) -> Any:
        """The message for `output`; with a finish reason if the engine or a stop text ended the sequence."""
        text, kept, stopped = self._text_of(output)
        finish = pb.FINISH_REASON_STOP if stopped else FINISH_REASONS[output.finish]
        logprobs = (output.logprobs or [])[:kept]
        message = self._response_type(
            text=text if self._begun else self._echo + text,
            token_ids=output.token_ids[:kept],
            logprobs=[self.logprob(entry) for entry in logprobs] if self._shows_logprobs else (),
            finish_reason=finish,
            index=self._index,
        )
        if finish or not self._begun:
            message.model, message.version = self._resolved.model, self._resolved.version
        self._begun = True
        self.tokens += kept
        self._logprob_sum += sum(entry.logprob or 0.0 for entry in logprobs)
        if finish:
            self.ended = True
            if self._scored:
                message.score = self.score
        return message

    def _text_of(self, output: SequenceOutput) -> tuple[str, int, bool]:
        """Text that became certain, how many of the tokens count, and whether a stop text was met."""
        if self._detokenizer is None:
            return "", len(output.token_ids), False
        ids = output.token_ids
        if output.finish == "stop" and ids and ids[-1] in self._sampling.stop_token_ids:
            ids = ids[:-1]  # what ends a text is no part of it
        # One token at a time where a stop text may cut: how many came together is chance, the answer must not be.
        step = 1 if self._has_stops else max(len(ids), 1)
        text = ""
        for position in range(0, len(ids), step):
            matching = self.tokens + position >= self._sampling.min_tokens
            piece = self._detokenizer.feed(ids[position : position + step], matching=matching)
            text += piece.text
            if piece.stop is not None:
                return text, position + 1, True
        if output.finish:
            piece = self._detokenizer.finish()
            return text + piece.text, len(output.token_ids), piece.stop is not None
        return text, len(output.token_ids), False


class BestOf:
    """Keeps the messages of all completions until the best can be told, by score."""

    def __init__(self) -> None:
        self._messages: dict[int, list[Any]] = {}

    def keep(self, message: Any) -> None:
        """Takes a message of any completion."""
        self._messages.setdefault(message.index, []).append(message)

    def best(self, count: int) -> Iterable[Any]:
        """The messages of the `count` completions with the highest scores, best first, numbered anew from 0.

        Of equal scores the one that was sampled first is the better, so the same request has the same answer.
        """
        ranked = sorted(self._messages.values(), key=lambda messages: (-messages[-1].score, messages[0].index))
        for index, messages in enumerate(ranked[:count]):
            for message in messages:
                message.index = index
                yield message
