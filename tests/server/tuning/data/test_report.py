"""report.py: what a checked data set holds, and what keeps it from being trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.server.tuning.data.data_harness import CHAT, PAIR, with_facts
from tests.server.tuning.rows_harness import CHAT_TEMPLATE, jsonl, make_text

from graftwork_server.errors import InvalidArgument
from graftwork_server.text import TextProcessor
from graftwork_server.tuning.data import check_dataset, tokenize_rows


def test_a_hundred_errors_are_listed_and_all_are_counted() -> None:
    report = check_dataset([b"x\n"] * 250, None, 0)
    assert (len(report.errors), report.error_count, report.row_count) == (100, 250, 0)


def test_what_comes_after_the_first_ten_is_counted_by_kind() -> None:
    lines = [b"x\n"] * 12 + [b'{"text": ""}\n'] * 5 + [b'{"text": %d}\n' % n for n in range(7)]
    report = check_dataset(lines, None, 0)
    assert report.error_count == 24
    assert [(kind.count, kind.first_line) for kind in report.more_errors] == [(7, 18), (5, 13), (2, 11)]
    assert report.more_errors[0].reason == '"text" must be text, not a number'
    assert sum(kind.count for kind in report.more_errors) == report.error_count - 10
    many = [b'{"text": "a", "text": "b"}\n'] * 10 + [b'{"text": "a"}%s\n' % (b"x" * n) for n in range(1, 30)]
    assert sum(kind.count for kind in check_dataset(many, None, 0).more_errors) == 29


def test_a_field_too_many_is_one_error() -> None:
    rows = [PAIR | {"id": n} for n in range(1000)] + [PAIR | {"source": "x"}, PAIR]
    report = check_dataset(jsonl(rows), None, 0)
    (error,) = report.errors
    assert (error.line, report.error_count, report.row_count, report.valid) == (1, 1, 1, False)
    assert error.reason.startswith(
        'unknown field "id" (1,000 rows, from line 1 on), "source" (line 1001); a row of the '
    )
    assert error.reason.endswith("leave the others out")
    assert "form prompt_completion has" in error.reason
    message = {"role": "assistant", "content": "x", "weight": 1}
    report = check_dataset(jsonl([{"messages": [message, message]}] * 20), None, 0)
    assert [error.reason[:58] for error in report.errors] == [
        'unknown field "weight" of messages (20 rows, from line 1 o'
    ]


def test_a_field_too_many_leaves_ten_problems_to_be_shown() -> None:
    report = check_dataset([*jsonl([PAIR | {"id": 1}]), *[b"x\n"] * 30], None, 0)
    assert report.error_count == 31
    assert "unknown field" in report.errors[0].reason
    assert [(kind.count, kind.first_line) for kind in report.more_errors] == [(21, 11)]


def test_the_report_counts_tokens(text: TextProcessor) -> None:
    long = {"prompt": "abcdef", "completion": "gh"}
    report = check_dataset(jsonl([PAIR, long]), text, 8)
    assert (report.total_tokens, report.loss_tokens) == (6 + 8, 3 + 1)
    assert (report.longest_row_tokens, report.cut_rows, report.valid) == (10, 1, True)


def test_a_set_whose_loss_is_cut_off_is_refused(text: TextProcessor) -> None:
    report = check_dataset(jsonl([PAIR, PAIR]), text, 3)
    assert (report.valid, report.loss_tokens, report.cut_rows, report.row_count) == (False, 0, 2, 2)
    assert "set max_sequence_tokens higher or shorten" in report.errors[0].reason
    assert report.errors[0].place == ""
    below = check_dataset(jsonl([PAIR]), text, 3, context_tokens=64).errors[0].reason
    assert below.endswith("set max_sequence_tokens higher (up to 64) or shorten the prompts")
    at_most = check_dataset(jsonl([PAIR]), text, 3, context_tokens=3).errors[0].reason
    assert at_most.endswith("that is the base model's context, so shorten the prompts")


def test_chat_needs_a_template_and_says_so_once(plain: TextProcessor) -> None:
    report = check_dataset(jsonl([CHAT] * 5), plain, 0)
    assert report.error_count == 1
    assert "chat template" in report.errors[0].reason
    assert not report.valid


def test_what_the_template_refuses_is_a_line_error(tmp_path: Path) -> None:
    strict = make_text(tmp_path, template="{{ raise_exception('roles must alternate') }}")
    report = check_dataset(jsonl([CHAT, CHAT]), strict, 0)
    assert [error.line for error in report.errors] == [1, 2]
    assert "roles must alternate" in report.errors[0].reason


def test_rows_without_an_end_are_told_before_training(tmp_path: Path) -> None:
    endless = make_text(tmp_path, eos="", template=None)
    report = check_dataset(jsonl([PAIR, PAIR]), endless, 0)
    assert report.valid
    assert "names a token that ends a text" in report.warnings[0]
    ending = make_text(tmp_path / "b", template=None)
    assert check_dataset(jsonl([PAIR, PAIR]), ending, 0).warnings == []
    assert "every row is cut before its end" in check_dataset(jsonl([PAIR]), ending, 4).warnings[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b\nd"},
        {"prompt": "a\nd", "completion": "b"},
        {"messages": [{"role": "user", "content": "a\nd"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "a\nd", "output": "b"},
        {"text": "a\nd"},
    ],
)
def test_a_token_without_an_embedding_is_named_by_line(tmp_path: Path, row: dict[str, str]) -> None:
    text = make_text(tmp_path, template=CHAT_TEMPLATE.replace("\n", ""))
    last = text.token_id("\n")
    assert last == text.greatest_id
    good = json.loads(json.dumps(row).replace("\\n", "c"))
    lines = jsonl([good, row])
    (error,) = check_dataset(lines, with_facts(text, embedding_rows=last), 0).errors
    assert (error.line, error.reason.partition(",")[0]) == (2, f"token '\\n' has the id {last}")
    assert check_dataset(lines, with_facts(text, embedding_rows=last + 1), 0).valid
    with pytest.raises(InvalidArgument, match="line 2: token"):
        list(tokenize_rows(lines, with_facts(text, embedding_rows=last), 0))
