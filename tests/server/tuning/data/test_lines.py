"""lines.py: every rule of the data formats, told by line."""

from __future__ import annotations

import io
import json
import re

import pytest
from tests.server.tuning.data.data_harness import CHAT, PAIR, TASK, TEXT
from tests.server.tuning.rows_harness import jsonl

from graftwork_server.text import TextProcessor
from graftwork_server.tuning.data import MAX_LINE_BYTES, check_dataset, read_lines, tokenize_rows
from graftwork_server.types import DatasetFormat


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (CHAT, DatasetFormat.CHAT),
        (PAIR, DatasetFormat.PROMPT_COMPLETION),
        (TASK, DatasetFormat.INSTRUCTION),
        ({"instruction": "up", "output": "AB"}, DatasetFormat.INSTRUCTION),
        ({"instruction": "up", "input": None, "output": "AB"}, DatasetFormat.INSTRUCTION),
        (TEXT, DatasetFormat.TEXT),
    ],
)
def test_the_form_is_detected_and_stated(row: dict[str, object], form: DatasetFormat) -> None:
    report = check_dataset(jsonl([row, row]), None, 0)
    assert (report.format, report.row_count, report.valid, report.errors) == (form, 2, True, [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe{\x00}\x00", "not UTF-8.*UTF-16"),
        (b'{"text": "\xe9"}', r"not UTF-8 \(byte 11\)"),
        (b"\xef\xbb\xbf" + json.dumps(TEXT).encode(), "byte order mark"),
        (b'{"text": "a"', r"not JSON: .*\(column 13\)"),
        (b'{"text": "a"} {"text": "b"}', r"not JSON: Extra data \(column 15\)"),
        (b'["a"]', "holds a list"),
        (b'"a"', "holds text"),
        (b"null", "holds null"),
        (b'{"text": "a", "text": "b"}', 'field "text" appears twice'),
        (b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', 'field "role" appears twice'),
        (b'{"text": NaN}', "NaN is not JSON"),
        (b'{"text": -Infinity}', "-Infinity is not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"{}", "the row is empty; accepted"),
        (b'{"txt": "a"}', 'fields "txt"; accepted'),
        (b'{"prompt": "a"}', 'field "completion" is missing'),
        (b'{"completion": "a"}', 'field "prompt" is missing'),
        (b'{"prompt": "a", "completion": "b", "id": 3}', 'unknown field "id"'),
        (b'{"prompt": "a", "text": "b"}', "mixes the fields of PROMPT_COMPLETION and TEXT"),
        (b'{"prompt": 1, "completion": "b"}', '"prompt" must be text, not a number'),
        (b'{"prompt": "a", "completion": ["b"]}', '"completion" must be text, not a list'),
        (b'{"prompt": "a", "completion": true}', "not true or false"),
        (b'{"prompt": "", "completion": "b"}', '"prompt" is empty'),
        (b'{"prompt": "a", "completion": " \\n"}', '"completion" is empty'),
        (b'{"text": null}', "not null"),
        (b'{"output": "a"}', 'field "instruction" is missing'),
        (b'{"instruction": "a", "input": 3, "output": "b"}', '"input" must be text'),
        (b'{"messages": []}', "not an empty list"),
        (b'{"messages": {}}', "not an object"),
        (b'{"messages": ["a"]}', "message 1 must be an object"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', 'role "tool" is not known'),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no message has the role assistant"),
        (b'{"messages": [{"role": "assistant", "content": ""}]}', 'message 1: "content" is empty'),
        (b'{"messages": [{"role": "assistant"}]}', 'message 1: the field "content" is missing'),
        (b'{"messages": [{"role": "assistant", "content": "x", "name": "y"}]}', 'unknown field "name"'),
        (
            b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}]}',
            "message 2: a system message is accepted as the first one only",
        ),
    ],
)
def test_a_bad_line_is_told_with_number_and_reason(line: bytes, reason: str) -> None:
    report = check_dataset([*jsonl([TEXT]), line + b"\n"], None, 0)
    (error,) = report.errors
    assert error.line == 2
    assert re.search(reason, error.reason), error.reason
    assert (report.row_count, report.error_count, report.valid) == (1, 1, False)


def test_a_line_of_another_form_names_both() -> None:
    report = check_dataset(jsonl([3, PAIR, TEXT, PAIR]), None, 0)
    assert [error.line for error in report.errors] == [1, 3]
    assert "form text" in report.errors[1].reason
    assert "by line 2, is prompt_completion" in report.errors[1].reason
    assert report.format == DatasetFormat.PROMPT_COMPLETION


def test_empty_lines_are_accepted_at_the_end_only() -> None:
    good = jsonl([TEXT])
    assert check_dataset([*good, b"\n", b"  \r\n", b""], None, 0).valid
    report = check_dataset([*good, b"\n", b"\n", *good], None, 0)
    assert [error.line for error in report.errors] == [2, 3]


def test_an_empty_file_is_refused() -> None:
    for lines in ([], [b"\n"]):
        report = check_dataset(lines, None, 0)
        assert not report.valid
        assert report.format is None
        assert report.errors[0].line == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'[{"prompt": "a", "completion": "b"},\n{"prompt": "a", "completion": "b"}]\n', "is a JSON array; "),
        (b'[\n{"prompt": "a", "completion": "b"}\n]\n', "jq -c '.[]' FILE.json > FILE.jsonl"),
        (b'{\n"prompt": "a",\n"completion": "b"\n}\n', "goes over several lines"),
        (b"prompt,completion\na,b\n", "looks like CSV with the columns prompt, completion; "),
        (b"\xef\xbb\xbfprompt;completion\r\na;b\r\n", "looks like CSV"),
        (b'"prompt"\t"completion"\n"a"\t"b"\n', "csv.DictReader"),
        (b"PAR1\x15\x04", "is a Parquet file; "),
        (b"\x1f\x8b\x08\n\n", "compressed with gzip"),
        (b"PK\x03\x04\n", "a zip archive or a spreadsheet"),
    ],
)
def test_files_of_other_kinds_are_one_problem_that_says_what_to_do(data: bytes, words: str) -> None:
    report = check_dataset(read_lines(io.BytesIO(data)), None, 0)
    (error,) = report.errors
    assert (error.line, report.error_count, report.valid) == (0, 1, False)
    assert words in error.reason
    assert "JSON Lines" in error.reason


def test_content_may_be_a_list_of_text_parts(text: TextProcessor) -> None:
    parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}]
    messages = [CHAT["messages"][0], {"role": "assistant", "content": parts}]
    assert list(tokenize_rows(jsonl([{"messages": messages}]), text, 0)) == list(tokenize_rows(jsonl([CHAT]), text, 0))
    for wrong in ({"type": "image_url", "image_url": "x"}, "yo", {"type": "text"}, {"type": "text", "text": 1}):
        report = check_dataset(jsonl([{"messages": [{"role": "assistant", "content": [wrong]}]}]), text, 0)
        assert report.error_count == 1, report
        assert "message 1: " in report.errors[0].reason


def test_long_lines_are_refused_in_bounded_memory() -> None:
    good = json.dumps(TEXT).encode()
    file = io.BytesIO(good + b"\n" + b"x" * (3 * MAX_LINE_BYTES) + b"\n" + good + b"\n" + b"y" * (2 * MAX_LINE_BYTES))
    lines = list(read_lines(file))
    assert [len(line) for line in lines] == [len(good) + 1, MAX_LINE_BYTES + 1, len(good) + 1, MAX_LINE_BYTES + 1]
    assert [error.line for error in check_dataset(lines, None, 0).errors] == [2, 4]
