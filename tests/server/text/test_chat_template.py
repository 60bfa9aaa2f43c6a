"""text/ and chat_template.py against transformers and against `decode` of everything at once."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graftwork_server.errors import FailedPrecondition, InvalidArgument
from graftwork_server.text import IncrementalDetokenizer, StopMatcher, TextProcessor

SPECIALS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "Grüße aus Köln, naïve café", "你好 世界 👩‍👩‍👧 🎉🎉"] * 20

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = """{% for m in messages %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
    <|{{ m.role }}|>
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}{{ m.content }}{{ eos_token }}{% endif %}

{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
CHECKING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages, please') }}{% endif %}"
    "{{ {'ä': '<b>', 'tools': tools} | tojson }}{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}"
    "{% if tools is none %}no tools{% endif %}{{ messages[0].reasoning_content }}"
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """The shape of Llama 2, Mistral and Phi-3: byte fallback, spaces as U+2581, the first one stripped."""
    pieces = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz你", "▁t", "he", "▁the"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


BYTE_LEVEL = TextProcessor(byte_level(), {}, None)
SENTENCEPIECE = TextProcessor(sentencepiece(), {}, None)
processors = st.sampled_from([BYTE_LEVEL, SENTENCEPIECE])


def save(folder: Path, template: str | None, **kwargs: Any) -> TextProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", **kwargs
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return TextProcessor.from_dir(folder)


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"]
    return [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]


# ------------------------------------------------------------------------------------------- against transformers

TEXTS = ["", " ", "the quick fox", "  Grüße\n\n", "a</s>b <|user|>x", "👩‍👩‍👧你好", "\x00\u200d"]


@pytest.mark.parametrize("kwargs", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_encode_and_decode_equal_transformers(tmp_path: Path, kwargs: dict[str, bool]) -> None:
    ours = save(tmp_path, None, extra_special_tokens=["<|end|>"], **kwargs)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "x<|end|>y"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode_plain(text) == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_ids == set(theirs.all_special_ids) | {theirs.convert_tokens_to_ids(t) for t in SPECIALS}
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


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


@given(turns=st.lists(st.text(alphabet="ab é你🎉\n", min_size=1, max_size=8), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_mask_by_blocks_equals_transformers(tmp_path_factory: pytest.TempPathFactory, turns: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp() / "marked"
    ours = TextProcessor.from_dir(folder) if folder.exists() else save(folder, MARKED)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat(*turns), return_assistant_tokens_mask=True)
    taught = ours.encode_taught_chat(chat(*turns))
    assert (taught.ids, taught.mask) == (theirs["input_ids"], theirs["assistant_masks"])


# ------------------------------------------------------------------------------------------- masks


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


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        TextProcessor.from_dir(tmp_path)
    assert caught.value.reason == "TOKENIZER_MISSING"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FailedPrecondition) as caught:
        TextProcessor.from_dir(tmp_path)
    assert caught.value.reason == "TOKENIZER_INVALID"
    assert str(tmp_path) not in caught.value.message


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        BYTE_LEVEL.encode("a\ud800")
    assert caught.value.reason == "TEXT_INVALID"


def test_token_text() -> None:
    assert SENTENCEPIECE.token_text(SENTENCEPIECE.token_id("▁the") or 0) == " the"
    assert BYTE_LEVEL.token_text(2) == "</s>"
    assert BYTE_LEVEL.token_text(10**6) == ""
    assert [BYTE_LEVEL.token_text(id) for id in BYTE_LEVEL.encode("𐍈")] == ["\ufffd"] * 4


# ------------------------------------------------------------------------------------------- detokenizer


@st.composite
def sequences(draw: st.DrawFn) -> tuple[TextProcessor, list[list[int]]]:
    """A processor and a token stream in chunks: text in any script, or any ids at all."""
    text = draw(processors)
    any_ids = st.lists(st.integers(0, text.vocab_size - 1), max_size=30)
    some_text = st.text(alphabet=st.sampled_from("the quick é你世👩\u200d👧🎉\ufffd\n"), max_size=20)
    ids = draw(st.one_of(any_ids, some_text.map(text.encode)))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=10)))
    return text, [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@given(sequences(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_whole(sequence: tuple[TextProcessor, list[list[int]]], skip: bool) -> None:
    text, chunks = sequence
    whole = text.decode([*chain(*chunks)], skip_special_tokens=skip)
    for stream in (chunks, [[id] for id in [*chain(*chunks)]]):
        detokenizer = IncrementalDetokenizer(text, skip_special_tokens=skip)
        joined = ""
        for chunk in stream:
            joined += detokenizer.feed(chunk).text
            assert whole.startswith(joined)
        assert joined + detokenizer.finish().text == whole


@given(sequences(), st.lists(st.text(alphabet="the q🎉é你", min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_stop_texts_end_the_stream_where_they_first_complete(
    sequence: tuple[TextProcessor, list[list[int]]], stops: list[str]
) -> None:
    text, chunks = sequence
    whole = text.decode([*chain(*chunks)])
    ends = [(whole.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole]
    detokenizer = IncrementalDetokenizer(text, stops)
    pieces = [*(detokenizer.feed(chunk) for chunk in chunks), detokenizer.finish()]
    joined = "".join(piece.text for piece in pieces)
    if not ends:
        assert (joined, pieces[-1].stop) == (whole, None)
        return
    end, _, stop = min(ends)
    assert pieces[-1].stop == stop
    assert joined == whole[: end - len(stop)]


def test_an_emoji_comes_whole() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    assert [detokenizer.feed([id]).text for id in BYTE_LEVEL.encode("a𐍈b")] == ["a", "", "", "", "𐍈", "b"]


def test_text_that_may_become_a_stop_is_held_back_and_released() -> None:
    matcher = StopMatcher(["END", "ND!"])
    assert [matcher.feed(piece).text for piece in ("xE", "N", "E", "N", "x")] == ["x", "", "EN", "", "ENx"]
    assert (matcher.feed("EN").text, matcher.flush()) == ("", "EN")
    matcher = StopMatcher(["END", "ND!"])
    assert [matcher.feed(piece).stop for piece in ("E", "N", "D")] == [None, None, "END"]


def test_rubbish_bytes_cost_a_bounded_time_each() -> None:
    continuation = BYTE_LEVEL.encode("𐍈")[-1]
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    joined = ""
    for _ in range(500):
        joined += detokenizer.feed([continuation]).text
        assert len(detokenizer._window) <= 17
    assert joined + detokenizer.finish().text == "\ufffd" * 500
