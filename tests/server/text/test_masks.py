"""Which tokens of a conversation are learned, by blocks of the template and without them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.text.text_harness import MARKED, PLAIN, chat, save
from transformers import AutoTokenizer

from graftwork_server.text import TextProcessor


@given(turns=st.lists(st.text(alphabet="ab é你🎉\n", min_size=1, max_size=8), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_mask_by_blocks_equals_transformers(tmp_path_factory: pytest.TempPathFactory, turns: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp() / "marked"
    ours = TextProcessor.from_dir(folder) if folder.exists() else save(folder, MARKED)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat(*turns), return_assistant_tokens_mask=True)
    taught = ours.encode_taught_chat(chat(*turns))
    assert (taught.ids, taught.mask) == (theirs["input_ids"], theirs["assistant_masks"])


def masked_text(text: TextProcessor, messages: list[dict[str, str]]) -> str:
    taught = text.encode_taught_chat(messages)
    assert taught.ids == text.encode_chat(messages, add_generation_prompt=False)
    shown = (text.token_text(id) if on else "|" for id, on in zip(taught.ids, taught.mask, strict=True))
    return "".join(shown).strip("|")


def test_mask_by_prefix_covers_content_and_end_of_turn(tmp_path: Path) -> None:
    text = save(tmp_path, PLAIN)
    assert masked_text(text, chat("fox", "dog")) == "dog</s>"
    first, _, second = masked_text(text, chat("fox", "dog", "the", "lazy")).partition("|")
    assert (first, second.strip("|")) == ("dog</s>", "lazy</s>")


def test_mask_by_prefix_equals_mask_by_blocks(tmp_path: Path) -> None:
    marked = PLAIN.replace(
        "{{ m['content'] }}{{ eos_token }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{{ '' }}",
    )
    messages = chat("the fox", " Grüße 🎉", "x", "你\n")
    by_blocks = save(tmp_path / "marked", marked).encode_taught_chat(messages)
    assert save(tmp_path / "plain", PLAIN).encode_taught_chat(messages) == by_blocks


def test_end_of_sequence_right_after_a_block_is_learned(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|user|>{% generation %}{{ m.content }}{% endgeneration %}</s>\n{% endfor %}"
    assert masked_text(save(tmp_path, template), chat("fox")) == "fox</s>"


def test_all_bytes_of_a_last_character_are_masked(tmp_path: Path) -> None:
    text = save(
        tmp_path, "{% for m in messages %}<|user|>{% generation %}{{ m.content }}{% endgeneration %}x{% endfor %}"
    )
    taught = text.encode_taught_chat(chat("𐍈"))
    assert len(taught.ids) == 6
    assert taught.mask == [0, 1, 1, 1, 1, 0]


def test_a_template_that_rewrites_earlier_turns_is_learned_as_it_renders(tmp_path: Path) -> None:
    template = PLAIN.replace("|>{{ m['content']", "|>{% if loop.last %}think {% endif %}{{ m['content']")
    text = save(tmp_path, template.replace("|>{% if loop.last", "|>{% if loop.last and m.role == 'assistant'"))
    assert masked_text(text, chat("a", "b")) == "think b</s>"
    first, _, second = masked_text(text, chat("a", "b", "c", "d")).partition("|")
    assert (first, second.strip("|")) == ("b</s>", "think d</s>")
