"""Every rule of the data formats; label masks token by token."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from tests.server.tuning.tuner_harness import jsonl, make_text

from graftwork_plugins import IGNORED_LABEL
from graftwork_server.errors import InvalidArgument
from graftwork_server.text import ModelFacts, TextProcessor
from graftwork_server.tuning.data import (
    MAX_LINE_BYTES,
    check_dataset,
    instruction_prompt,
    read_lines,
    tokenize_rows,
)
from graftwork_server.tuning.data.rows import learned_ends
from graftwork_server.types import DatasetFormat

PAIR = {"prompt": "ab", "completion": "cd"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
TASK = {"instruction": "up", "input": "ab", "output": "AB"}
TEXT = {"text": "abc"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextProcessor:
    """With a chat template."""
    return make_text(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TextProcessor:
    """Without a chat template."""
    return make_text(tmp_path_factory.mktemp("plain"), template=None)


def learned(row: object, text: TextProcessor) -> tuple[str, str]:
    """A row's whole text, and the text of the tokens that carry loss, written as one token each."""
    ids = list(row.input_ids)  # type: ignore[attr-defined]
    labels = list(row.labels)  # type: ignore[attr-defined]
    assert len(ids) == len(labels)
    assert all(label in (IGNORED_LABEL, id) for id, label in zip(ids, labels, strict=True))
    return (
        "".join(text.token_text(id) for id in ids),
        "".join(text.token_text(id) for id, label in zip(ids, labels, strict=True) if label != IGNORED_LABEL),
    )


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


def test_prompt_and_completion(text: TextProcessor) -> None:
    (row,) = tokenize_rows(jsonl([PAIR]), text, 0)
    assert learned(row, text) == ("<s>abcd</s>", "cd</s>")
    prompt_ids = text.encode("ab")
    assert list(row.input_ids[: len(prompt_ids)]) == prompt_ids  # as Generate would see it


def test_chat_learns_every_assistant_turn_and_its_end(text: TextProcessor) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    (row,) = tokenize_rows(jsonl([{"messages": messages}]), text, 0)
    whole, loss = learned(row, text)
    assert whole == (
        "<|system|>s<|end|>\n<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>d<|end|>\n"
    )
    assert loss == "b<|end|>d<|end|>"


def test_a_chat_template_without_an_end_gets_one(tmp_path: Path) -> None:
    bare = make_text(
        tmp_path,
        template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    (row,) = tokenize_rows(jsonl([CHAT]), bare, 0)
    assert learned(row, bare) == ("user: hi\nassistant: yo\n</s>", "yo\n</s>")


def test_instructions_without_a_chat_template(plain: TextProcessor) -> None:
    rows = list(tokenize_rows(jsonl([TASK, {"instruction": "up", "input": "", "output": "AB"}]), plain, 0))
    prompt = "### Instruction:\nup\n\n### Input:\nab\n\n### Response:\n"
    assert instruction_prompt("up", "ab") == prompt
    assert learned(rows[0], plain) == (f"<s>{prompt}AB</s>", "AB</s>")
    assert learned(rows[1], plain) == ("<s>### Instruction:\nup\n\n### Response:\nAB</s>", "AB</s>")


def test_instructions_with_a_chat_template(text: TextProcessor) -> None:
    (row,) = tokenize_rows(jsonl([TASK]), text, 0)
    whole, loss = learned(row, text)
    assert whole == "<|user|>up\n\nab<|end|>\n<|assistant|>AB<|end|>\n"
    assert loss == "AB<|end|>"
    prompt = text.encode_chat([{"role": "user", "content": "up\n\nab"}])
    assert list(row.input_ids[: len(prompt)]) == prompt  # as Chat would see it


def test_text_is_learned_whole(text: TextProcessor) -> None:
    (row,) = tokenize_rows(jsonl([TEXT]), text, 0)
    assert learned(row, text) == ("<s>abc</s>", "<s>abc</s>")
    # The first token has nothing before it, so it does not count.
    assert check_dataset(jsonl([TEXT]), text, 0).loss_tokens == 4


def test_a_cut_row_has_no_false_end(text: TextProcessor) -> None:
    (row,) = tokenize_rows(jsonl([PAIR]), text, 4)
    assert learned(row, text) == ("<s>abc", "c")


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


def test_tokenizing_stops_at_the_first_bad_line(text: TextProcessor) -> None:
    rows = tokenize_rows([*jsonl([PAIR]), b"x\n"], text, 0)
    next(rows)
    with pytest.raises(InvalidArgument, match="line 2: the line is not JSON"):
        next(rows)


# ------------------------------------------------------------------------------------------- ends


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_facts(text: TextProcessor, **facts: object) -> TextProcessor:
    text.facts = ModelFacts(**facts)  # type: ignore[arg-type]
    return text


@pytest.mark.parametrize("row", [CHAT, TASK])
def test_a_conversation_ends_as_its_template_says(tmp_path: Path, row: dict[str, object]) -> None:
    """Whatever the tokenizer and the model's configuration name."""
    text = with_facts(make_text(tmp_path, template=CHATML), eos_token_ids=[1])
    (made,) = tokenize_rows(jsonl([row]), text, 0)
    assert learned(made, text)[1].endswith("<|end|>")
    assert learned_ends(made, text) == {text.token_id("<|end|>")}


def test_a_text_ends_with_the_tokenizers_end_or_else_the_models(tmp_path: Path) -> None:
    for name, eos, ends in (("named", "</s>", {2}), ("unnamed", "", {6})):
        text = with_facts(make_text(tmp_path / name, eos=eos, template=None), eos_token_ids=[6, 1])
        for row in (PAIR, TASK, TEXT):
            (made,) = tokenize_rows(jsonl([row]), text, 0)
            assert set(made.labels[-1:]) == ends
            assert learned_ends(made, text) == ends


def test_a_block_that_goes_on_after_its_end_has_one_end(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}<|end|>{{ '\n' }}{% endgeneration %}"
        "{% endfor %}"
    )
    text = make_text(tmp_path, template=template)
    (made,) = tokenize_rows(jsonl([CHAT]), text, 0)
    assert learned(made, text) == ("<|user|>hi<|end|>\n<|assistant|>yo<|end|>\n", "hi<|end|>\nyo<|end|>\n")
    assert learned_ends(made, text) == {text.token_id("<|end|>")}


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", "</s>"])
@pytest.mark.parametrize("row", [{"prompt": "ab", "completion": "cd"}, {"text": "cd"}])
def test_a_text_that_writes_its_end_gets_no_second_one(tmp_path: Path, row: dict[str, str], end: str) -> None:
    """Conversations that were rendered beforehand end as the template's do, not as the tokenizer's texts."""
    text = make_text(tmp_path, template=CHATML)
    (made,) = tokenize_rows(
        jsonl([{key: value + end if "c" in value else value for key, value in row.items()}]), text, 0
    )
    assert learned(made, text)[1].endswith("cd" + end)
    assert learned_ends(made, text) == {text.token_id(end.strip())}


def test_of_several_ends_the_first_is_where_a_model_may_stop(tmp_path: Path) -> None:
    """As Phi-3's templates: the turn's end, a line break, and at the conversation's end the tokenizer's."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{{ '\n' }}{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    text = make_text(tmp_path, template=template)
    (made,) = tokenize_rows(jsonl([CHAT]), text, 0)
    assert learned(made, text)[1] == "yo<|end|>\n</s>"
    assert learned_ends(made, text) == {text.token_id("<|end|>")}


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
    text = make_text(tmp_path, template=CHATML.replace("\n", ""))
    last = text.token_id("\n")
    assert last == text.greatest_id
    good = json.loads(json.dumps(row).replace("\\n", "c"))
    lines = jsonl([good, row])
    (error,) = check_dataset(lines, with_facts(text, embedding_rows=last), 0).errors
    assert (error.line, error.reason.partition(",")[0]) == (2, f"token '\\n' has the id {last}")
    assert check_dataset(lines, with_facts(text, embedding_rows=last + 1), 0).valid
    with pytest.raises(InvalidArgument, match="line 2: token"):
        list(tokenize_rows(lines, with_facts(text, embedding_rows=last), 0))
