"""What commands print: JSON, aligned columns, text from a model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from graftwork.types import GenerationChunk, TokenLogprob, TuningProgress

T = TypeVar("T")

_LEAST_ROOM = 20
"""Columns; in fewer a text is not wrapped."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(value: Any) -> Any:
    """A value as JSON knows it: dataclasses as objects, times as ISO 8601, NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def emit(value: Any) -> None:
    """Prints a value as JSON on one line of stdout, at once."""
    print(json.dumps(plain(value), ensure_ascii=False), flush=True)


def say(value: Any, line: str, as_json: bool) -> None:
    """Prints what a command did: a value as JSON, or a line for people."""
    if as_json:
        emit(value)
    else:
        print(line)


def readable(text: str) -> str:
    """Text for stdout. On a terminal without control characters: a model's answer must not be able to steer it."""
    return _CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text


def stream(chunks: Iterable[GenerationChunk]) -> None:
    """Prints a generation's text as it comes."""
    started = False
    try:
        for chunk in chunks:
            started = True
            print(readable(chunk.text), end="", flush=True)
    finally:
        if started:
            print(flush=True)  # also when interrupted: the shell's prompt gets a line of its own


def logprobs(entries: Sequence[TokenLogprob]) -> None:
    """Prints a table of tokens with their log probabilities and, if there are any, the most likely ones."""
    rows = []
    for entry in entries:
        top = " ".join(f"{item.text!r}:{item.logprob:.4f}" for item in entry.top)
        rows.append((entry.token_id, repr(entry.text), "-" if entry.logprob is None else f"{entry.logprob:.6f}", top))
    header: tuple[str, ...] = ("token", "text", "logprob", "most likely")
    with_top = any(entry.top for entry in entries)
    table(header if with_top else header[:3], rows if with_top else [row[:3] for row in rows])


def listing(items: Sequence[T], header: Sequence[str], row: Callable[[T], Sequence[Any]], as_json: bool) -> None:
    """Prints items as one JSON list, or as a table with a row for each."""
    if as_json:
        emit(items)
    else:
        table(header, map(row, items))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints aligned columns with a header; the header alone where there are no rows."""
    lines = [tuple(header), *(tuple(_cell(cell) for cell in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        before = "".join(f"{cell.ljust(width)}  " for cell, width in zip(line[:-1], widths[:-1], strict=True))
        _print_wrapped(before, line[-1])


def fields(pairs: Iterable[tuple[str, Any]]) -> None:
    """Prints a name and a value on each line, aligned."""
    items = [(name, _cell(value)) for name, value in pairs]
    width = max(len(name) for name, _ in items)
    for name, value in items:
        _print_wrapped(f"{name.ljust(width)}  ", value)


def _print_wrapped(before: str, text: str) -> None:
    """Prints a line. On a terminal that is too narrow for it, `text` goes on below where it began."""
    lines = [text]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - len(before)
        if len(text) > room >= _LEAST_ROOM:
            lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    for index, line in enumerate(lines):
        print(readable(f"{' ' * len(before) if index else before}{line}".rstrip()))


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%SZ")
    return re.sub(r"\s+", " ", str(value))


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def duration(milliseconds: float) -> str:
    """A time span for people: 3.2s, 2m05s, 1h02m."""
    seconds = milliseconds / 1000
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def step(progress: TuningProgress | None) -> str | None:
    """How far a job is, such as 3/40."""
    return f"{progress.step}/{progress.total_steps}" if progress else None


def shortened(text: str, characters: int = 60) -> str:
    """A text as far as a table has room."""
    return text if len(text) <= characters else text[: characters - 3] + "..."
