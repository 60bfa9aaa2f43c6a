"""tokenizer.py against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.server.text.text_harness import BYTE_LEVEL, SENTENCEPIECE, SPECIALS, save
from transformers import AutoTokenizer

from graftwork_server.errors import FailedPrecondition, InvalidArgument
from graftwork_server.text import TextProcessor

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
