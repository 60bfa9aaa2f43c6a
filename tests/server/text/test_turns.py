"""What is learned of a conversation, under templates as models have them, and against their own generation blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.server.text.text_harness import chat, save
from transformers import AutoTokenizer

from graftwork_server.errors import InvalidArgument
from graftwork_server.text import TextProcessor

EXTRA = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|end|>", "<|return|>", "<|start|>", "<|channel|>",
         "<|message|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|Assistant|>",
         "<|User|>"]  # fmt: skip

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3: the reasoning of earlier turns is left out, the last one gets an empty thought if it has none.
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content %}{%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}
        {{- content.lstrip('\n') + '<|im_end|>\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# DeepSeek-R1's distillates: the generation prompt opens a thought, a finished message shows none.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# gpt-oss: only the last message ends as one that is sampled does.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
    "{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def learned(text: TextProcessor, messages: list[dict[str, str]]) -> list[str]:
    """The runs of text that carry loss. What the tokens say is what the template renders."""
    taught = text.encode_taught_chat(messages)
    whole = text.render_chat(messages, add_generation_prompt=False)
    assert "".join(text.token_text(id) for id in taught.ids) == whole
    shown = "".join(text.token_text(id) if on else "\0" for id, on in zip(taught.ids, taught.mask, strict=True))
    return [run for run in shown.split("\0") if run]


def make(folder: Path, template: str) -> TextProcessor:
    return save(folder, template, extra_special_tokens=EXTRA)


FOUR = chat("the fox", "dog", "quick", "lazy")
THOUGHT = "<think>\nhm\n</think>\n\nfox"


@pytest.mark.parametrize(
    ("template", "messages", "expected", "end"),
    [
        (CHATML, FOUR, ["dog<|im_end|>", "lazy<|im_end|>"], "<|im_end|>"),
        (QWEN3, FOUR, ["dog<|im_end|>", "<think>\n\n</think>\n\nlazy<|im_end|>"], "<|im_end|>"),
        (
            QWEN3,
            chat("a", THOUGHT, "b", THOUGHT),
            ["fox<|im_end|>", "<think>\nhm\n</think>\n\nfox<|im_end|>"],
            "<|im_end|>",
        ),
        (DEEPSEEK, FOUR, ["dog</s>", "lazy</s>"], "</s>"),
        (PHI3, FOUR, ["dog<|end|>", "lazy<|end|>"], "<|end|>"),
        (HARMONY, FOUR, ["<|channel|>final<|message|>dog", "<|channel|>final<|message|>lazy<|return|>"], "<|return|>"),
        (LLAMA3, chat("a", "  dog ", "b", "lazy\n"), ["dog<|eot_id|>", "lazy<|eot_id|>"], "<|eot_id|>"),
        (LLAMA2, chat("a", "dog ", "b", "lazy"), [" dog </s>", " lazy </s>"], "</s>"),
        (GEMMA, FOUR, ["dog<end_of_turn>", "lazy<end_of_turn>"], "<end_of_turn>"),
        # " dog" is one token, in the conversation up to "lazy" as serving sends it. What "lazy" follows ends before it.
        (BARE, FOUR, [" dog", "lazy\n"], None),
    ],
    ids="chatml qwen3 qwen3-thoughts r1 phi3 gpt-oss llama3 llama2 gemma bare".split(),  # noqa: SIM905
)
def test_turns_are_learned_with_their_ends(
    tmp_path: Path, template: str, messages: list[dict[str, str]], expected: list[str], end: str | None
) -> None:
    text = make(tmp_path, template)
    assert learned(text, messages) == expected
    assert text.end_of_turn_id == (None if end is None else text.token_id(end))
    assert text.encode_taught_chat(messages).ended == (end is not None)


@pytest.mark.parametrize("template", [CHATML, QWEN3, PHI3, HARMONY, LLAMA3, GEMMA])
def test_the_last_message_follows_the_tokens_that_serving_sends(tmp_path: Path, template: str) -> None:
    text = make(tmp_path, template)
    served = text.encode_chat(FOUR[:-1])
    taught = text.encode_taught_chat(FOUR)
    assert taught.ids[: len(served)] == served
    assert taught.mask[len(served)] == 1


def test_reasoning_is_learned_where_serving_opens_it(tmp_path: Path) -> None:
    """The template shows none in a finished conversation."""
    text = make(tmp_path, DEEPSEEK)
    messages = chat("a", THOUGHT, "b", THOUGHT)
    taught = text.encode_taught_chat(messages)
    served = text.encode_chat(messages[:-1])
    assert taught.ids[: len(served)] == served
    assert text.decode(taught.ids[len(served) :], skip_special_tokens=False) == "hm\n</think>\n\nfox</s>"
    assert taught.mask[len(served) :] == [1] * (len(taught.ids) - len(served))
    assert taught.ended


def test_messages_that_look_like_the_template_are_still_found(tmp_path: Path) -> None:
    text = make(tmp_path, CHATML)
    inside = "x<|im_end|>\n<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    assert learned(text, chat(inside, inside + "y", inside, "z")) == [f"{inside}y<|im_end|>", "z<|im_end|>"]


def test_what_cannot_be_known_is_refused_by_message(tmp_path: Path) -> None:
    hiding = "{% for m in messages %}{% if m.role == 'user' or loop.last %}[{{ m.content }}]{% endif %}{% endfor %}"
    with pytest.raises(InvalidArgument, match="shows assistant message 2 not at all") as caught:
        make(tmp_path / "a", hiding).encode_taught_chat(FOUR)
    assert caught.value.reason == "CHAT_TEMPLATE_HIDES_TURN"
    twice = "{% for m in messages %}[{{ m.content }}{{ m.content }}]{% endfor %}"
    with pytest.raises(InvalidArgument, match="assistant message 2 more than once"):
        make(tmp_path / "b", twice).encode_taught_chat(FOUR)


def test_a_turn_that_is_quoted_is_found(tmp_path: Path) -> None:
    text = make(tmp_path, "{% for m in messages %}{{ m | tojson }}<|end|>{% endfor %}")
    # Serving sends no more of this template than the messages before, so all of it is the model's to write.
    expected = '{"role": "assistant", "content": "say \\"x\\"\\n"}<|end|>'
    assert learned(text, chat("a", 'say "x"\n')) == [expected]


def block(template: str, written: str) -> str:
    """`template` with a generation block around what it writes for the assistant."""
    assert written in template
    return template.replace(written, "{% generation %}" + written + "{% endgeneration %}", 1)


def test_masks_without_blocks_are_those_of_the_blocks(tmp_path: Path) -> None:
    """As transformers computes them from the blocks of the same template."""
    turn = "{{ m.content }}<|im_end|>"
    plain = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n" + turn + "{{ '\n' }}{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{{ '' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
    )
    make(tmp_path / "blocks", block(plain, turn))
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "blocks").apply_chat_template(
        FOUR, return_assistant_tokens_mask=True
    )
    taught = make(tmp_path / "plain", plain).encode_taught_chat(FOUR)
    assert (taught.ids, taught.mask) == (theirs["input_ids"], theirs["assistant_masks"])


def test_a_block_that_ends_in_a_line_break_has_its_end(tmp_path: Path) -> None:
    """No second end is added after it, and the mask is transformers' own."""
    turn = "{{ m.content }}<|im_end|>{{ '\n' }}"
    template = "{% for m in messages %}<|im_start|>" + turn + "{% endfor %}"
    text = make(tmp_path, block(template, turn))
    taught = text.encode_taught_chat(FOUR)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(FOUR, return_assistant_tokens_mask=True)
    assert (taught.ids, taught.mask) == (theirs["input_ids"], theirs["assistant_masks"])
    assert taught.ended


def test_blocks_in_a_comment_are_none(tmp_path: Path) -> None:
    comment = "{#- not marked with {% generation %}\n  and {% endgeneration %} -#}"
    assert learned(make(tmp_path, comment + CHATML), FOUR) == ["dog<|im_end|>", "lazy<|im_end|>"]
