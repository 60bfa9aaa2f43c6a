"""chat_template.py against transformers, and what a template may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.server.text.text_harness import MARKED, PLAIN, chat, save
from transformers import AutoTokenizer

from graftwork_server.errors import FailedPrecondition, InvalidArgument
from graftwork_server.text import TextProcessor

CHECKING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages, please') }}{% endif %}"
    "{{ {'ä': '<b>', 'tools': tools} | tojson }}{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}"
    "{% if tools is none %}no tools{% endif %}{{ messages[0].reasoning_content }}"
)


# ------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("template", [PLAIN, MARKED, CHECKING])
def test_render_and_encode_chat_equal_transformers(tmp_path: Path, template: str) -> None:
    ours = save(tmp_path, template, add_bos_token=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        *chat("the <b>fox</b>", "Grüße  ", "👩‍👩‍👧", "x"),
        {"role": "user", "content": "y", "reasoning": "z", "q": None},
    ]
    for prompt in (True, False):
        options: Any = {"add_generation_prompt": prompt}
        assert ours.render_chat(messages, prompt) == theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.encode_chat(messages, prompt) == theirs.apply_chat_template(messages, **options)["input_ids"]


STRIPPING = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
QUOTING = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}{{ eos_token }}"


@pytest.mark.parametrize("template", [PLAIN, MARKED, STRIPPING, QUOTING])
@pytest.mark.parametrize("content", ["the answer is", "is ", "x\n\n", "fox"])
def test_an_unfinished_message_equals_transformers(tmp_path: Path, template: str, content: str) -> None:
    ours = save(tmp_path, template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    # The content stands elsewhere in the conversation too: where it is cut must not depend on that.
    messages = chat("fox", "x", f"the answer is {content}", content)
    expected = theirs.apply_chat_template(messages, continue_final_message=True)["input_ids"]
    assert ours.encode_chat(messages, continue_final_message=True) == expected
    assert expected != ours.encode_chat(messages, add_generation_prompt=False)


def test_a_message_that_the_template_does_not_show_cannot_be_continued(tmp_path: Path) -> None:
    hiding = save(tmp_path, "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(InvalidArgument) as caught:
        hiding.encode_chat(chat("a", "b"), continue_final_message=True)
    assert caught.value.violations[0].field == "continue_final_message"


def test_tools_equal_transformers(tmp_path: Path) -> None:
    ours = save(tmp_path, "{{ tools | tojson }}" + PLAIN)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "wärme", "parameters": {"n": 1, "x": 1.5, "flag": True}}}]
    expected = theirs.apply_chat_template(chat("x"), tools=tools, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(chat("x"), tools=tools) == expected


def test_a_named_template_among_several(tmp_path: Path) -> None:
    save(tmp_path, None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": PLAIN}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat("x"), tokenize=False)
    assert TextProcessor.from_dir(tmp_path).render_chat(chat("x"), False) == theirs


# ------------------------------------------------------------------------------------------- refusals


def test_the_templates_own_message_is_passed_on(tmp_path: Path) -> None:
    text = save(tmp_path, CHECKING)
    with pytest.raises(InvalidArgument, match="no system messages, please") as caught:
        text.render_chat([{"role": "system", "content": "x"}], True)
    assert caught.value.reason == "CHAT_TEMPLATE_REJECTED"
    assert caught.value.violations[0].field == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[9].content.x }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_failing_template_is_the_requests_error(tmp_path: Path, template: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        save(tmp_path, template).render_chat(chat("x"), True)
    assert caught.value.reason == "CHAT_TEMPLATE_REJECTED"


def test_without_a_usable_template_only_chat_is_refused(tmp_path: Path) -> None:
    for name, template, reason in [("a", None, "NO_CHAT_TEMPLATE"), ("b", "{% if %}", "CHAT_TEMPLATE_BROKEN")]:
        text = save(tmp_path / name, template)
        assert not text.has_chat_template
        assert text.decode(text.encode("fox")) == "fox"
        for call in (lambda t=text: t.encode_chat(chat("x")), lambda t=text: t.encode_taught_chat(chat("x"))):
            with pytest.raises(FailedPrecondition) as caught:
                call()
            assert caught.value.reason == reason
