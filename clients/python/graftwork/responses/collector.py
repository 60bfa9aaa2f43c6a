"""The pieces of a streamed generation, put together."""

from __future__ import annotations

import dataclasses

from graftwork import types
from graftwork.errors import InternalError


class Collector:
    """Puts the pieces of one generation together, and knows whether it is whole."""

    def __init__(self, *, wants_logprobs: bool, wants_prompt_logprobs: bool = False) -> None:
        self._wants_logprobs = wants_logprobs
        self._wants_prompt_logprobs = wants_prompt_logprobs
        self._chunks: list[types.GenerationChunk] = []

    @property
    def started(self) -> bool:
        """True once a piece has arrived; from then on the call must not be sent again."""
        return bool(self._chunks)

    def add(self, piece: types.GenerationChunk) -> types.GenerationChunk:
        """Takes a piece and returns it with model and version, which the server sends on the first and last only."""
        if self._chunks and not piece.model:
            first = self._chunks[0]
            piece = dataclasses.replace(piece, model=first.model, version=first.version)
        self._chunks.append(piece)
        return piece

    def check_whole(self, request_id: str) -> None:
        """Raises InternalError if the stream ended well before its last piece: half an answer must not look whole."""
        if not self._chunks or self._chunks[-1].finish_reason is None or self._chunks[-1].usage is None:
            raise InternalError(
                "the stream ended before its finish reason; the text so far is incomplete",
                reason="STREAM_TRUNCATED",
                request_id=request_id,
            )

    def result(self, request_id: str) -> types.Generation:
        """The whole generation. Raises InternalError if it is not whole."""
        self.check_whole(request_id)
        last = self._chunks[-1]
        assert last.usage is not None  # check_whole
        completions = tuple(self._completion(index) for index in sorted({piece.index for piece in self._chunks}))
        first = completions[0]
        prompt_logprobs = tuple(entry for piece in self._chunks for entry in piece.prompt_logprobs)
        return types.Generation(
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            logprobs=first.logprobs,
            usage=last.usage,
            model=last.model,
            version=last.version,
            completions=completions,
            prompt_logprobs=prompt_logprobs if self._wants_prompt_logprobs else None,
        )

    def _completion(self, index: int) -> types.Completion:
        pieces = [piece for piece in self._chunks if piece.index == index]
        finish_reason = pieces[-1].finish_reason
        if finish_reason is None:
            raise InternalError(f"completion {index} has no end", reason="STREAM_TRUNCATED")
        logprobs = tuple(entry for piece in pieces for entry in piece.logprobs)
        return types.Completion(
            index=index,
            text="".join(piece.text for piece in pieces),
            token_ids=tuple(token for piece in pieces for token in piece.token_ids),
            finish_reason=finish_reason,
            logprobs=logprobs if self._wants_logprobs else None,
            score=pieces[-1].score,
        )
