"""Grammars in the engine: compiled once, each sequence with a matcher of its own, and errors that are data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import toys

from graftwork_server.engine.grammars import KEPT, KEPT_TOKENIZERS, Grammars, Masks
from graftwork_server.engine.model import load_base
from graftwork_server.errors import FailedPrecondition, InvalidArgument
from graftwork_server.messages import Grammar
from graftwork_server.text import TextProcessor
from graftwork_server.types import AdapterRef, ModelInfo


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    directory = toys.make_text_model(tmp_path_factory.mktemp("model"))
    return load_base(str(directory), torch.device("cpu"), torch.float32, directory).info


def test_equal_grammars_are_compiled_once_and_matchers_are_apart(info: ModelInfo) -> None:
    grammars, masks = Grammars(info), Masks()
    text = TextProcessor.from_dir(info.tokenizer_dir or "")
    (a,), (b,) = text.encode_plain("a"), text.encode_plain("b")
    grammar = Grammar("regex", "ab")
    first, second = grammars.matcher(grammar, None), grammars.matcher(grammar, None)
    assert len(grammars._compiled) == 1
    assert first.consume_token(a)
    # Rows of a batch: free, after the first letter, before it; more columns than the tokenizer has tokens stay shut.
    logits = torch.zeros(3, info.vocab_size)
    masks.apply(logits, [1, 2], [first, second])
    assert [row.isfinite().nonzero()[:, 0].tolist() for row in logits] == [list(range(info.vocab_size)), [b], [a]]
    assert first.consume_token(b)
    assert first.is_stopped()
    assert not second.is_stopped()


def test_old_grammars_and_tokenizers_go(info: ModelInfo, tmp_path: Path) -> None:
    grammars = Grammars(info)
    source = Path(info.tokenizer_dir or "")
    for number in range(KEPT_TOKENIZERS + 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + " " * number + " ")
        adapter = AdapterRef(digest=str(number), path=str(folder), strategy="lora")
        assert not grammars.matcher(Grammar("regex", "a"), adapter).is_error()
    assert len(grammars._tokenizers) == KEPT_TOKENIZERS
    assert {key[0] for key in grammars._compiled} == set(grammars._tokenizers)
    for number in range(KEPT + 3):
        grammars.matcher(Grammar("regex", f"a{{{number}}}b"), None)
    assert len(grammars._compiled) == KEPT


def test_a_matcher_that_failed_allows_nothing(info: ModelInfo) -> None:
    matcher = Grammars(info).matcher(Grammar("regex", "a"), None)
    assert not matcher.consume_token(2**20)
    logits = torch.zeros(1, info.vocab_size)
    Masks().apply(logits, [0], [matcher])
    assert not logits.isfinite().any()


def test_errors_name_the_field_and_are_not_kept(info: ModelInfo) -> None:
    grammars = Grammars(info)
    for kind, text in (("regex", "("), ("lark", "start: x"), ("json_schema", '{"type": 3}')):
        with pytest.raises(InvalidArgument) as caught:
            grammars.matcher(Grammar(kind, text), None)
        assert caught.value.reason == "GRAMMAR_INVALID"
        assert caught.value.violations[0].field == f"sampling.structured_output.{kind}"
    assert not grammars._compiled


def test_without_a_tokenizer_there_is_none(llama_dir: Path) -> None:
    info = load_base(str(llama_dir), torch.device("cpu"), torch.float32, llama_dir).info
    with pytest.raises(FailedPrecondition) as caught:
        Grammars(info).matcher(Grammar("regex", "a"), None)
    assert caught.value.reason == "TOKENIZER_MISSING"


def test_what_takes_too_much_for_a_first_mask_is_refused_before_any_step(info: ModelInfo) -> None:
    grammars = Grammars(info)
    with pytest.raises(InvalidArgument) as caught:
        grammars.matcher(Grammar("regex", "(abcdefghijklmnopqrstuvwxyz){60000}"), None)
    assert caught.value.reason == "GRAMMAR_TOO_COMPLEX"
    assert not grammars._compiled
