"""Texts that are tokenised or decoded in parts: together they are the whole, and the first is what serving sends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.text.test_tokenizer_facts import byte_level, sentencepiece
from tests.server.text.text_harness import BYTE_LEVEL, SENTENCEPIECE

from graftwork_server.text import IncrementalDetokenizer, TextProcessor

WITH_BOS = TextProcessor(sentencepiece(), {"eos_token": "</s>"}, None)
GPT2 = TextProcessor(byte_level(), {}, None)
processors = st.sampled_from([BYTE_LEVEL, SENTENCEPIECE, WITH_BOS, GPT2])
texts = st.text(alphabet="the fox\n quick\u00e9\U0001f98a", min_size=1, max_size=12)


@given(processors, texts, texts)
@settings(max_examples=200, deadline=None)
def test_prompt_and_completion_are_the_joined_text(text: TextProcessor, prompt: str, completion: str) -> None:
    prompt_ids, completion_ids = text.encode_completion(prompt, completion)
    assert prompt_ids == text.encode(prompt)
    whole = text.encode(prompt + completion)
    if whole[: len(prompt_ids)] == prompt_ids:
        assert prompt_ids + completion_ids == whole
    else:  # a token across the border: other tokens, the same text
        assert text.decode(prompt_ids + completion_ids) == text.decode(whole)


def test_a_completion_gets_no_space_of_its_own() -> None:
    for prompt, completion, last in (("fox\n", "the", ["t", "he"]), ("fox", " the", ["\u2581the"])):
        _, ids = WITH_BOS.encode_completion(prompt, completion)
        assert [WITH_BOS._tokenizer.id_to_token(id) for id in ids] == last
    # " fox" would be one token; serving has sent the space by itself.
    prompt_ids, ids = GPT2.encode_completion("the ", "fox")
    assert prompt_ids == GPT2.encode("the ")
    assert [GPT2.token_text(id) for id in ids] == ["f", "o", "x"]


def test_words_within_a_text() -> None:
    assert [WITH_BOS.token_text(id) for id in WITH_BOS.encode_plain("the")] == [" the"]
    assert [WITH_BOS.token_text(id) for id in WITH_BOS.encode_following("the")] == ["t", "he"]
    assert [WITH_BOS.token_text(id) for id in WITH_BOS.encode_following(" the")] == [" the"]
    assert GPT2.encode_following("the") == GPT2.encode_plain("the")


@given(processors, texts, texts, st.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_continue_the_text_before_them(text: TextProcessor, first: str, second: str, skip: bool) -> None:
    before, ids = text.encode(first), text.encode_plain(second)
    detokenizer = IncrementalDetokenizer(text, skip_special_tokens=skip, before=before)
    joined = "".join(detokenizer.feed([id]).text for id in ids) + detokenizer.finish().text
    assert text.decode(before, skip) + joined == text.decode(before + ids, skip)


@pytest.mark.parametrize("before", [[], [1], list(range(7, 263))])
def test_tokens_before_may_be_anything(before: list[int]) -> None:
    the = WITH_BOS.token_id("\u2581the")
    assert the is not None
    detokenizer = IncrementalDetokenizer(WITH_BOS, before=before)
    # Nothing, or a special token: the text begins here, and its first space is none.
    assert detokenizer.feed([the]).text == ("the" if len(before) < 2 else " the")
