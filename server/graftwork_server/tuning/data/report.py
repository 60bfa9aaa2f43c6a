"""The check of a whole data set, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from graftwork_server.errors import MESSAGE_CHARACTERS, FailedPrecondition
from graftwork_server.printable import make_printable
from graftwork_server.tuning.data.lines import Example, LineProblem, format_of, read_examples
from graftwork_server.tuning.data.rows import cut, loss_tokens, tokenize_example
from graftwork_server.types import DatasetFormat

if TYPE_CHECKING:
    from graftwork_server.text import TextProcessor

MAX_ERRORS = 100
"""Errors that a report lists; error_count counts them all."""


class LineError(msgspec.Struct, frozen=True):
    """A line that cannot be used; line 0 is the file as a whole."""

    line: int
    reason: str

    def __post_init__(self) -> None:
        make_printable(self, reason=MESSAGE_CHARACTERS)

    @property
    def place(self) -> str:
        """ "line 3", or "" for the file as a whole."""
        return f"line {self.line}" if self.line else ""


class DatasetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What check_dataset found. Tokens are 0 where only the lines were checked."""

    format: DatasetFormat | None
    """By the first good line; None: there is none."""
    row_count: int
    """Rows that can be used."""
    errors: list[LineError]
    """The first 100."""
    error_count: int
    total_tokens: int
    """Of all usable rows, after cutting."""
    loss_tokens: int
    """Tokens that carry loss, after cutting, end of sequence included."""
    longest_row_tokens: int
    """Before cutting."""
    cut_rows: int
    """Rows longer than max_sequence_tokens."""
    valid: bool
    """True if a job would take it."""


def check_dataset(
    lines: Iterable[bytes], text: TextProcessor | None, max_sequence_tokens: int, context_tokens: int = 0
) -> DatasetReport:
    """Reads every line; with `text`, tokenises every row as training would, cut to `max_sequence_tokens` (0: not cut).

    `context_tokens`: the most that rows can be cut to, 0 where that is not known. Never raises for what the lines hold.
    """
    check = _Check(text, max_sequence_tokens, context_tokens)
    for number, example in read_examples(lines):
        if isinstance(example, LineProblem):
            check.refuse(number, str(example))
        else:
            check.add(number, example)
    return check.report()


class _Check:
    def __init__(self, text: TextProcessor | None, max_sequence_tokens: int, context_tokens: int) -> None:
        self._text = text
        self._max_sequence_tokens = max_sequence_tokens
        self._context_tokens = context_tokens
        self._format: DatasetFormat | None = None
        self._rows = self._error_count = self._total = self._loss = self._longest = self._cut = 0
        self._errors: list[LineError] = []
        self._unusable: str | None = None

    def refuse(self, line: int, reason: str) -> None:
        self._error_count += 1
        if len(self._errors) < MAX_ERRORS:
            self._errors.append(LineError(line, reason))

    def add(self, line: int, example: Example) -> None:
        self._format = self._format or format_of(example)
        if self._text is not None and self._unusable is None:
            try:
                row = tokenize_example(example, self._text)
            except LineProblem as problem:
                self.refuse(line, str(problem))
                return
            except FailedPrecondition as error:
                self._unusable = error.message  # for this row and all others alike: said once
            else:
                kept = cut(row, self._max_sequence_tokens)
                self._total += len(kept.input_ids)
                self._loss += loss_tokens(kept)
                self._longest = max(self._longest, len(row.input_ids))
                self._cut += len(kept.input_ids) < len(row.input_ids)
        self._rows += 1

    def report(self) -> DatasetReport:
        if self._unusable is not None:
            self.refuse(0, self._unusable)
        elif self._rows == 0 and self._error_count == 0:
            self.refuse(0, "the data set has no rows")
        elif self._rows and self._text is not None and self._loss == 0:
            self.refuse(0, self._no_loss())
        return DatasetReport(
            format=self._format,
            row_count=self._rows,
            errors=self._errors,
            error_count=self._error_count,
            total_tokens=self._total,
            loss_tokens=self._loss,
            longest_row_tokens=self._longest,
            cut_rows=self._cut,
            valid=self._error_count == 0,
        )

    def _no_loss(self) -> str:
        if self._cut:
            return (
                f"no token carries loss: {self._cut} of {self._rows} rows are cut at {self._max_sequence_tokens} "
                f"tokens, before their completion begins; {how_to_fit(self._max_sequence_tokens, self._context_tokens)}"
            )
        return "no token carries loss, so there is nothing to learn"


def how_to_fit(max_sequence_tokens: int, context_tokens: int) -> str:
    """What helps where rows are cut too early."""
    if max_sequence_tokens == context_tokens:
        return "that is the base model's context, so shorten the prompts"
    most = f" (up to {context_tokens})" if context_tokens else ""
    return f"set max_sequence_tokens higher{most} or shorten the prompts"
