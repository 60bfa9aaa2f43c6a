"""rows.py: label masks token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.server.tuning.data.data_harness import CHAT, PAIR, TASK, TEXT, with_facts
from tests.server.tuning.rows_harness import CHAT_TEMPLATE, jsonl, make_text

from graftwork_plugins import IGNORED_LABEL
from graftwork_server.errors import InvalidArgument
from graftwork_server.text import TextProcessor
from graftwork_server.tuning.data import check_dataset, instruction_prompt, tokenize_rows
from graftwork_server.tuning.data.rows import learned_ends


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


def test_tokenizing_stops_at_the_first_bad_line(text: TextProcessor) -> None:
    rows = tokenize_rows([*jsonl([PAIR]), b"x\n"], text, 0)
    next(rows)
    with pytest.raises(InvalidArgument, match="line 2: the line is not JSON"):
        next(rows)


# ------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("row", [CHAT, TASK])
def test_a_conversation_ends_as_its_template_says(tmp_path: Path, row: dict[str, object]) -> None:
    """Whatever the tokenizer and the model's configuration name."""
    text = with_facts(make_text(tmp_path, template=CHAT_TEMPLATE), eos_token_ids=[1])
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
    text = make_text(tmp_path, template=CHAT_TEMPLATE)
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
