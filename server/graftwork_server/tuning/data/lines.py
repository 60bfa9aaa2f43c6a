"""One line of JSONL to one example, or the reason why not. The bytes come from a client and may be anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import msgspec

from graftwork_server.types import DatasetFormat

MAX_LINE_BYTES = 4 * 1024 * 1024
"""Longest line that is read."""

MAX_MESSAGES = 1024
"""Most messages in one chat row."""

ROLES = ("system", "user", "assistant")

FORMS = {
    DatasetFormat.CHAT: '{"messages": [{"role", "content"}, ...]}',
    DatasetFormat.PROMPT_COMPLETION: '{"prompt", "completion"}',
    DatasetFormat.INSTRUCTION: '{"instruction", "input" (optional), "output"}',
    DatasetFormat.TEXT: '{"text"}',
}
"""The forms as messages show them."""

_FIELDS: dict[DatasetFormat, tuple[str, ...]] = {
    DatasetFormat.CHAT: ("messages",),
    DatasetFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DatasetFormat.INSTRUCTION: ("instruction", "input", "output"),
    DatasetFormat.TEXT: ("text",),
}


class LineProblem(ValueError):
    """Why a line cannot be used, and what would be accepted."""


class ExtraFields(LineProblem):
    """Fields that no row of this form has, of a row that is good otherwise. `fields`: each as messages name it."""

    def __init__(self, fields: Sequence[str], accepted: str) -> None:
        super().__init__(f"unknown field {', '.join(fields)}; {accepted}")
        self.fields = list(fields)
        self.accepted = accepted


class Chat(msgspec.Struct, frozen=True):
    """Messages of {"role", "content"}, at least one by the assistant."""

    messages: list[dict[str, str]]


class PromptCompletion(msgspec.Struct, frozen=True):
    """What the model is given, and what it is to answer."""

    prompt: str
    completion: str


class Instruction(msgspec.Struct, frozen=True):
    """A task, what it is applied to ("" if nothing), and the answer."""

    instruction: str
    input: str
    output: str


class Text(msgspec.Struct, frozen=True):
    """Plain text, all of it to be learned."""

    text: str


Example = Chat | PromptCompletion | Instruction | Text


def format_of(example: Example) -> DatasetFormat:
    """The form that `example` was written in."""
    match example:
        case Chat():
            return DatasetFormat.CHAT
        case PromptCompletion():
            return DatasetFormat.PROMPT_COMPLETION
        case Instruction():
            return DatasetFormat.INSTRUCTION
        case Text():
            return DatasetFormat.TEXT


def _shown(form: DatasetFormat) -> str:
    """The form as clients and the README write it."""
    return form.lower()


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a binary file, in bounded memory: of a line over MAX_LINE_BYTES only the beginning is yielded, one byte
    too long, so that it is refused as what it is."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
        yield line


def read_examples(lines: Iterable[bytes]) -> Iterator[tuple[int, Example | LineProblem]]:
    """Each line's number, from 1, with what it holds. All must have the form of the first good one.

    Empty lines are passed over at the end of the file and are a problem elsewhere. A file of another kind (CSV, a JSON
    array, ...) is one problem, of line 0.
    """
    file_form: tuple[DatasetFormat, int] | None = None
    empty_from = 0
    for number, line in enumerate(lines, 1):
        if number == 1 and (other := other_format(line)) is not None:
            yield 0, LineProblem(other)
            return
        if not line.strip():
            empty_from = empty_from or number
            continue
        if empty_from:
            for empty in range(empty_from, number):
                yield empty, LineProblem("the line is empty; empty lines are accepted at the end of the file only")
            empty_from = 0
        try:
            example = parse_line(line)
            form = format_of(example)
            if file_form is None:
                file_form = (form, number)
            elif form != file_form[0]:
                raise LineProblem(
                    f"the row has the form {_shown(form)} {FORMS[form]}, but the file's form, by line {file_form[1]}, "
                    f"is {_shown(file_form[0])} {FORMS[file_form[0]]}; a file has one form"
                )
        except LineProblem as problem:
            yield number, problem
        else:
            yield number, example


def parse_line(line: bytes) -> Example:
    """The example that one line holds. Raises LineProblem."""
    row = _json_object(line)
    form = _form_of_keys(row)
    accepted = _FIELDS[form]
    example = _example(row, form)
    if extra := [key for key in row if key not in accepted]:
        raise ExtraFields(_each_quoted(extra), f"a row of the form {_shown(form)} has {FORMS[form]}")
    if isinstance(example, Chat) and (extra := _extra_of_messages(row["messages"])):
        raise ExtraFields([f"{name} of messages" for name in _each_quoted(extra)], 'a message has "role" and "content"')
    return example


def _example(row: dict[str, Any], form: DatasetFormat) -> Example:
    match form:
        case DatasetFormat.CHAT:
            return Chat(_messages(row["messages"]))
        case DatasetFormat.PROMPT_COMPLETION:
            return PromptCompletion(_text(row, "prompt"), _text(row, "completion"))
        case DatasetFormat.INSTRUCTION:
            # An empty input is how Alpaca-like sets say that there is none.
            context = _text(row, "input") if row.get("input") not in (None, "") else ""
            return Instruction(_text(row, "instruction"), context, _text(row, "output"))
        case DatasetFormat.TEXT:
            return Text(_text(row, "text"))


_TO_JSONL = 'a data set is JSON Lines: one JSON object a line, such as {"prompt": ..., "completion": ...}'
_FROM_CSV = (
    "python3 -c 'import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin)]' "
    "< FILE.csv > FILE.jsonl"
)
_BINARY = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "compressed with gzip",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"SQLite format 3": "an SQLite database",
}
_SEPARATED = re.compile(r"[\w .\"'-]+(?:[,;\t][\w .\"'-]+)+")


def other_format(first_line: bytes) -> str | None:
    """What a file is that is no JSON Lines, and what to do, told by its first line; None if it may be JSON Lines."""
    for magic, what in _BINARY.items():
        if first_line.startswith(magic):
            return f"the file is {what}; {_TO_JSONL}"
    text = first_line.decode("utf-8", "replace").strip().removeprefix("\ufeff")
    if text.startswith("["):
        return f"the file is a JSON array; {_TO_JSONL}. To make it so: jq -c '.[]' FILE.json > FILE.jsonl"
    if text == "{":
        return f"the file's JSON goes over several lines; {_TO_JSONL}. To make it so: jq -c . FILE.json > FILE.jsonl"
    if _SEPARATED.fullmatch(text):
        columns = ", ".join(re.split(r"[,;\t]", text)[:6])
        return f"the file looks like CSV with the columns {columns[:200]}; {_TO_JSONL}. To make it so: {_FROM_CSV}"
    return None


def _json_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise LineProblem(f"the line is longer than {MAX_LINE_BYTES} bytes")
    if line.startswith(b"\xef\xbb\xbf"):
        raise LineProblem("the line starts with a byte order mark; save the file as UTF-8 without one")
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        utf16 = line.startswith((b"\xff\xfe", b"\xfe\xff"))
        hint = "; it looks like UTF-16, save it as UTF-8" if utf16 else ""
        raise LineProblem(f"the line is not UTF-8 (byte {error.start + 1}){hint}") from None
    try:
        row = json.loads(text, object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise LineProblem(f"the line is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise LineProblem("the line's JSON is nested too deeply") from None
    except LineProblem:
        raise
    except ValueError:  # Python's limit on the digits of an integer
        raise LineProblem("the line's JSON has a number with too many digits") from None
    if not isinstance(row, dict):
        raise LineProblem(f"the line holds {_kind(row)}; a row is a JSON object such as {FORMS[DatasetFormat.TEXT]}")
    return row


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise LineProblem(f"field {_quoted([twice])} appears twice in one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise LineProblem(f"{name} is not JSON")


def _form_of_keys(row: dict[str, Any]) -> DatasetFormat:
    """The form by the fields that only it has."""
    forms = [form for form, fields in _FIELDS.items() if any(key in row for key in fields)]
    if len(forms) > 1:
        raise LineProblem(
            f"the row mixes the fields of {' and '.join(forms)}: {_quoted(list(row))}; accepted: {_all_forms()}"
        )
    if not forms:
        found = f"the row has the fields {_quoted(list(row))}" if row else "the row is empty"
        raise LineProblem(f"{found}; accepted: {_all_forms()}")
    return forms[0]


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise LineProblem(f'"messages" must be a list of at least one {{"role", "content"}}, not {_kind(value)}')
    if len(value) > MAX_MESSAGES:
        raise LineProblem(f'"messages" has {len(value)} entries; at most {MAX_MESSAGES} are accepted')
    messages: list[dict[str, str]] = []
    for index, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            raise LineProblem(f'message {index} must be an object {{"role", "content"}}, not {_kind(entry)}')
        where = f"message {index}: "
        role = _text(entry, "role", where)
        if role not in ROLES:
            raise LineProblem(f"{where}role {_quoted([role])} is not known; accepted: {', '.join(ROLES)}")
        if role == "system" and index > 1:
            raise LineProblem(f"{where}a system message is accepted as the first one only")
        messages.append({"role": role, "content": _text(_joined(entry, where), "content", where)})
    if not any(message["role"] == "assistant" for message in messages):
        raise LineProblem("no message has the role assistant, so there is nothing to learn")
    return messages


def _extra_of_messages(messages: list[dict[str, Any]]) -> list[str]:
    names = (key for message in messages for key in message if key not in ("role", "content"))
    return list(dict.fromkeys(names))


def _joined(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with content that is text: a list of text parts, as other APIs have it, is joined as it is."""
    parts = message.get("content")
    if not isinstance(parts, list) or not parts:
        return message
    for index, part in enumerate(parts, 1):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
            raise LineProblem(f'{where}part {index} of "content" is not {{"type": "text", "text": ...}}')
    return {**message, "content": "".join(_text(part, "text", where) for part in parts)}


def _text(row: dict[str, Any], field: str, where: str = "") -> str:
    if field not in row:
        raise LineProblem(f'{where}the field "{field}" is missing')
    value = row[field]
    if not isinstance(value, str):
        raise LineProblem(f'{where}"{field}" must be text, not {_kind(value)}')
    if not value.strip():
        raise LineProblem(f'{where}"{field}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LineProblem(f'{where}"{field}" has half of a surrogate pair, which is no character') from None
    return value


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case []:
            return "an empty list"
        case list():
            return "a list"
        case _:
            return "an object"


def _quoted(names: list[str]) -> str:
    """Names from the client, cut so that a message stays a message."""
    return ", ".join(_each_quoted(names[:6])) + (", ..." if len(names) > 6 else "")


def _each_quoted(names: list[str]) -> list[str]:
    return [json.dumps(name[:40]) for name in names]


def _all_forms() -> str:
    return " or ".join(FORMS.values())
