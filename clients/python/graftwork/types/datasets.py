"""Data sets, and what a check of one found."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

DatasetForm: TypeAlias = Literal["unspecified", "chat", "prompt_completion", "instruction", "text"]


@dataclass(frozen=True)
class Dataset:
    """A stored data set. The same bytes have the same dataset_id."""

    name: str
    dataset_id: str
    display_name: str
    format: DatasetForm
    row_count: int
    size_bytes: int
    create_time: datetime | None


@dataclass(frozen=True)
class LineError:
    """A line (from 1; 0: the data set as a whole) that cannot be used, and what would be accepted."""

    line: int
    reason: str


@dataclass(frozen=True)
class LineErrorKind:
    """Bad lines whose reasons differ in values alone: the first one's reason and line, and how many there are."""

    reason: str
    count: int
    first_line: int


@dataclass(frozen=True)
class DatasetReport:
    """What a check of a data set found.

    errors holds the first 100 bad lines, error_count counts them all; more_errors: those after the first ten, by kind.
    What is wrong in the same way with every row, such as an unknown field, is one error. total_tokens and loss_tokens
    count after rows were cut to the sequence length, longest_row_tokens before. warnings: what a job would do, but
    hardly as meant.
    """

    valid: bool
    format: DatasetForm
    row_count: int
    errors: tuple[LineError, ...]
    error_count: int
    total_tokens: int
    loss_tokens: int
    longest_row_tokens: int
    cut_rows: int
    more_errors: tuple[LineErrorKind, ...] = ()
    warnings: tuple[str, ...] = ()
