"""The check of a whole data set, before anything is trained on it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from graftwork_server.errors import MESSAGE_CHARACTERS, FailedPrecondition
from graftwork_server.printable import make_printable
from graftwork_server.tuning.data.lines import Example, ExtraFields, LineProblem, format_of, read_examples, read_lines
from graftwork_server.tuning.data.rows import cut, learned_ends, loss_tokens, tokenize_example
from graftwork_server.types import DatasetFormat

if TYPE_CHECKING:
    from graftwork_server.text import TextProcessor

MAX_ERRORS = 100
"""Errors that a report lists; error_count counts them all."""
FIRST_ERRORS = 10
"""Errors that people are shown; what comes after them is counted by its kind."""
MAX_KINDS = 20
MAX_EXTRA_FIELDS = 20
_VALUES = re.compile(r'"(?:[^"\\]|\\.)*"|[0-9][0-9,.]*')
"""What differs between reasons of one kind."""


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


class ErrorKind(msgspec.Struct, frozen=True):
    """Errors that differ in values alone: how many, the first one's line, and its reason."""

    reason: str
    count: int
    first_line: int

    def __post_init__(self) -> None:
        make_printable(self, reason=MESSAGE_CHARACTERS)


class DatasetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What check_dataset found. Tokens are 0 where only the lines were checked."""

    format: DatasetFormat | None
    """By the first good line; None: there is none."""
    row_count: int
    """Rows that can be used."""
    errors: list[LineError]
    """The first 100. What is unknown in every row, such as a column too many, is one error."""
    more_errors: list[ErrorKind] = []
    """Those after the first 10, by kind, the most frequent first; of more than 20 kinds the last one is all others."""
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
    warnings: list[str] = []
    """What a job would do as asked, but hardly as meant."""


def check_dataset(
    lines: Iterable[bytes], text: TextProcessor | None, max_sequence_tokens: int, context_tokens: int = 0
) -> DatasetReport:
    """Reads every line; with `text`, tokenises every row as training would, cut to `max_sequence_tokens` (0: not cut).

    `context_tokens`: the most that rows can be cut to, 0 where that is not known. Never raises for what the lines hold.
    """
    check = _Check(text, max_sequence_tokens, context_tokens)
    for number, example in read_examples(lines):
        if isinstance(example, LineProblem):
            check.refuse(number, example)
        else:
            check.add(number, example)
    return check.report()


def check_dataset_file(
    path: Path, text: TextProcessor | None, max_sequence_tokens: int, context_tokens: int = 0
) -> DatasetReport:
    """As check_dataset, of a file. Blocking."""
    with path.open("rb") as file:
        return check_dataset(read_lines(file), text, max_sequence_tokens, context_tokens)


class _Check:
    def __init__(self, text: TextProcessor | None, max_sequence_tokens: int, context_tokens: int) -> None:
        self._text = text
        self._max_sequence_tokens = max_sequence_tokens
        self._context_tokens = context_tokens
        self._format: DatasetFormat | None = None
        self._rows = self._error_count = self._total = self._loss = self._longest = self._cut = 0
        self._errors: list[LineError] = []
        self._kinds: dict[str, ErrorKind] = {}
        self._extra: dict[str, tuple[int, int]] = {}
        """Unknown fields: in how many rows, and the first one's line."""
        self._extra_accepted = ""
        self._unusable: str | None = None
        self._ends = False

    def refuse(self, line: int, problem: LineProblem) -> None:
        if isinstance(problem, ExtraFields):
            self._note_extra(line, problem)
            return
        self._error_count += 1
        reason = str(problem)
        if len(self._errors) < MAX_ERRORS:
            self._errors.append(LineError(line, reason))
        if self._error_count > FIRST_ERRORS:
            self._count(line, reason)

    def _count(self, line: int, reason: str) -> None:
        kind = _VALUES.sub("", reason)
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            kind, reason = "", "of other kinds"
        known = self._kinds.get(kind, ErrorKind(reason, 0, line))
        first = min(known.first_line, line)
        self._kinds[kind] = ErrorKind(known.reason, known.count + 1, first)

    def _note_extra(self, line: int, problem: ExtraFields) -> None:
        self._extra_accepted = self._extra_accepted or problem.accepted
        for field in problem.fields:
            if field in self._extra or len(self._extra) < MAX_EXTRA_FIELDS:
                count, first = self._extra.get(field, (0, line))
                self._extra[field] = (count + 1, first)

    def _extra_error(self) -> LineError:
        """All unknown fields as one error, at the line that has the first of them."""
        first = min(line for _, line in self._extra.values())
        found = ", ".join(
            f"{field} ({'line ' + str(line) if count == 1 else f'{count:,} rows, from line {line} on'})"
            for field, (count, line) in self._extra.items()
        )
        return LineError(first, f"unknown field {found}; {self._extra_accepted}: leave the others out")

    def add(self, line: int, example: Example) -> None:
        self._format = self._format or format_of(example)
        if self._text is not None and self._unusable is None:
            try:
                row = tokenize_example(example, self._text)
            except LineProblem as problem:
                self.refuse(line, problem)
                return
            except FailedPrecondition as error:
                self._unusable = error.message  # for this row and all others alike: said once
            else:
                kept = cut(row, self._max_sequence_tokens)
                self._total += len(kept.input_ids)
                self._loss += loss_tokens(kept)
                self._longest = max(self._longest, len(row.input_ids))
                self._cut += len(kept.input_ids) < len(row.input_ids)
                self._ends = self._ends or bool(learned_ends(kept, self._text))
        self._rows += 1

    def report(self) -> DatasetReport:
        if self._extra:
            self._error_count += 1
            for error in self._errors[FIRST_ERRORS - 1 : FIRST_ERRORS]:  # not among the first ten any more
                self._count(error.line, error.reason)
            self._errors.insert(0, self._extra_error())
        if self._unusable is not None:
            self.refuse(0, LineProblem(self._unusable))
        elif self._rows == 0 and self._error_count == 0:
            self.refuse(0, LineProblem("the data set has no rows"))
        elif self._rows and self._text is not None and self._loss == 0:
            self.refuse(0, LineProblem(self._no_loss()))
        return DatasetReport(
            format=self._format,
            row_count=self._rows,
            errors=self._errors[:MAX_ERRORS],
            more_errors=sorted(self._kinds.values(), key=lambda kind: -kind.count),
            error_count=self._error_count,
            total_tokens=self._total,
            loss_tokens=self._loss,
            longest_row_tokens=self._longest,
            cut_rows=self._cut,
            valid=self._error_count == 0,
            warnings=[no_end(self._text)] if self._text is not None and self._loss and not self._ends else [],
        )

    def _no_loss(self) -> str:
        if self._cut:
            return (
                f"no token carries loss: {self._cut} of {self._rows} rows are cut at {self._max_sequence_tokens} "
                f"tokens, before their completion begins; {how_to_fit(self._max_sequence_tokens, self._context_tokens)}"
            )
        return "no token carries loss, so there is nothing to learn"


def no_end(text: TextProcessor) -> str:
    """Why a model that learns from a data set will not learn to stop."""
    if text.end_ids:
        return "every row is cut before its end, so the tuned model will not learn to stop; max_tokens ends its texts"
    return (
        "neither the tokenizer, nor the base model's configuration, nor the chat template names a token that ends a "
        "text, so the tuned model will not learn to stop; max_tokens and stop texts end its texts"
    )


def how_to_fit(max_sequence_tokens: int, context_tokens: int) -> str:
    """What helps where rows are cut too early."""
    if max_sequence_tokens == context_tokens:
        return "that is the base model's context, so shorten the prompts"
    most = f" (up to {context_tokens})" if context_tokens else ""
    return f"set max_sequence_tokens higher{most} or shorten the prompts"
