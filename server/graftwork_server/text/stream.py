"""Tokens to text as they come, and the stop texts that end it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from graftwork_server.text.tokenizer import TextProcessor

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 64
"""Tokens before the first that are looked at."""


class TextPiece(msgspec.Struct, frozen=True):
    """Text that became certain, and the stop text that ended it, if one did."""

    text: str
    stop: str | None = None


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text as they come.

    A piece never holds half a character, nor U+FFFD where later tokens complete it, nor any part of a stop text.
    Without a stop, the pieces together are `text.decode(all ids)`, or with tokens `before` them, what the ids add to
    the text of those: the space that a decoder takes off a text's beginning stays. Each id costs a bounded time,
    except a run of byte tokens (SentencePiece), which is decoded once when it ends: its decoder shows either all of a
    run as characters or none of it.
    """

    def __init__(
        self,
        text: TextProcessor,
        stops: Iterable[str] = (),
        skip_special_tokens: bool = True,
        before: Sequence[int] = (),
    ) -> None:
        self._text = text
        self._skipped = text.special_ids if skip_special_tokens else frozenset[int]()
        self._stops = StopMatcher(stops)
        self._window = self._end_of(before)  # tokens of the last certain text, as context, then those not certain yet
        self._emitted = len(self._decode_window())  # characters of the window's text that were passed on
        self._pending = 0  # tokens at the window's end that came since the last certain text
        self._stopped: str | None = None

    def feed(self, ids: Iterable[int], matching: bool = True) -> TextPiece:
        """The text that became certain with `ids`. After a stop text was met, nothing more comes.

        Text that became certain without `matching` is passed on, and no stop text begins in it.
        """
        if self._stopped is not None:
            return TextPiece("", self._stopped)
        new = [id for id in ids if id not in self._skipped]
        if not new:
            return TextPiece("")
        self._window += new
        self._pending += len(new)
        if new[-1] in self._text.byte_fallback_ids:
            return TextPiece("")
        text = self._certain_text()
        return self._match(text) if matching else TextPiece(text)

    def finish(self) -> TextPiece:
        """What is left once the last token came: half characters as U+FFFD, and what might have become a stop text."""
        if self._stopped is not None:
            return TextPiece("", self._stopped)
        rest = self._decode_window()[self._emitted :]
        self._window, self._emitted, self._pending = [], 0, 0
        piece = self._match(rest)
        return piece if piece.stop is not None else TextPiece(piece.text + self._stops.flush())

    def _end_of(self, before: Sequence[int]) -> list[int]:
        """The last tokens of `before`, as many as what follows may depend on."""
        shown = [id for id in before[-_CONTEXT_TOKENS:] if id not in self._skipped]
        start = max(len(shown) - 4, 0)
        while start and shown[start] in self._text.byte_fallback_ids:
            start -= 1
        return shown[start:]

    def _match(self, text: str) -> TextPiece:
        piece = self._stops.feed(text)
        self._stopped = piece.stop
        return piece

    def _decode_window(self) -> str:
        return self._text.decode(self._window, skip_special_tokens=False)

    def _certain_text(self) -> str:
        decoded = self._decode_window()
        # An unfinished character is one U+FFFD at the very end.
        certain = len(decoded) - decoded.endswith(_REPLACEMENT)
        text = decoded[self._emitted : certain]
        if certain == len(decoded):
            self._keep(self._pending)
            self._emitted = len(self._decode_window())
            self._pending = 0
        elif len(self._window) > 16:
            # At most three bytes are unfinished, and each token here is a byte at least.
            self._keep(4)
            self._emitted = len(self._decode_window()) - 1
        else:
            self._emitted = certain
        return text

    def _keep(self, count: int) -> None:
        self._window = self._window[-count:]


class StopMatcher:
    """Finds the first stop text to be completed in a stream of characters, and holds back what may become one. None of
    them is empty.

    Knuth, Morris and Pratt's automaton, one per stop text, so a character costs the number of stop texts whatever
    their length, and the outcome does not depend on how the stream was cut. Of several that one character completes,
    the longest counts.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def feed(self, text: str) -> TextPiece:
        """The text before a stop text, or what can no longer be part of one."""
        text = self._held + text
        if not self._stops:
            return TextPiece(text)
        for position in range(len(self._held), len(text)):
            for index, stop in enumerate(self._stops):
                if self._advance(index, text[position]) == len(stop):
                    self._held = ""
                    return TextPiece(text[: position + 1 - len(stop)], stop)
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return TextPiece(text[:certain])

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _advance(self, index: int, character: str) -> int:
        stop, failures, matched = self._stops[index], self._failures[index], self._matched[index]
        while matched and stop[matched] != character:
            matched = failures[matched - 1]
        matched += stop[matched] == character
        self._matched[index] = matched
        return matched


def _failure_table(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of the longest proper prefix that is its suffix too."""
    table = [0] * len(stop)
    length = 0
    for position in range(1, len(stop)):
        while length and stop[length] != stop[position]:
            length = table[length - 1]
        length += stop[length] == stop[position]
        table[position] = length
    return table
