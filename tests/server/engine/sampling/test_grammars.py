"""Grammars in the engine: compiled once, each sequence with a matcher of its own, and errors that are data."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from tests import toys

from graftwork_server.engine.sampling.grammars import KEPT, KEPT_TOKENIZERS, Grammars, Masks
from graftwork_server.errors import FailedPrecondition, InvalidArgument
from graftwork_server.layers.models.causal import load_base
from graftwork_server.text import TextProcessor
from graftwork_server.types import AdapterRef, ModelInfo
from graftwork_server.wire.engine import Grammar


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


def test_what_takes_too_much_in_a_later_step_is_given_up(info: ModelInfo) -> None:
    """Its first mask is cheap; after twenty letters, none of its masks is."""
    matcher = Grammars(info).matcher(Grammar("regex", "[a-z]{20}(abcdefghijklmnopqrstuvwxyz){60000}"), None)
    masks = Masks()
    for _ in range(60):
        logits = torch.zeros(1, info.vocab_size)
        masks.apply(logits, [0], [matcher])
        if not logits.isfinite().any():
            break
        matcher.consume_token(int(logits[0].argmax()))
    assert matcher.is_error()


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("choice", json.dumps([f"choice number {index * 7919 % 10007}" for index in range(1000)])),
        Grammar("regex", r"(\w+ ){1,200}\."),
        Grammar("regex", r"([^\n]{1,100}\n){1,50}"),
        Grammar("json_schema", json.dumps({"type": "string", "maxLength": 20_000})),
        Grammar(
            "json_schema",
            json.dumps(
                {
                    "type": "object",
                    "properties": {
                        f"field_{index}": {"type": "string", "pattern": f"^[A-Z]{{2,3}}-{index}[0-9]{{4}}$"}
                        for index in range(300)
                    },
                    "required": [f"field_{index}" for index in range(300)],
                }
            ),
        ),
    ],
    ids=["choices", "words", "lines", "string", "schema"],
)
def test_the_limits_leave_room_for_large_grammars(info: ModelInfo, grammar: Grammar) -> None:
    """Sixty random tokens of each: no mask takes too much."""
    matcher = Grammars(info).matcher(grammar, None)
    masks, chance = Masks(), torch.Generator().manual_seed(0)
    for _ in range(60):
        logits = torch.zeros(1, info.vocab_size)
        masks.apply(logits, [0], [matcher])
        assert not matcher.is_error(), matcher.get_error()
        matcher.consume_token(int(torch.multinomial(logits[0].softmax(0), 1, generator=chance)))
        if matcher.is_stopped():
            break


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(info: ModelInfo, tmp_path: Path, kind: str) -> None:
    """[PAD] after the last row, pieces in the vocabulary, an end that nobody has: the rest of the mask is the same."""
    source = Path(info.tokenizer_dir or "")
    document = json.loads((source / "tokenizer.json").read_text())
    if kind == "unigram":
        document["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[t, -1.0] for t in document["model"]["vocab"]]}
    vocab = document["model"]["vocab"]
    size = len(vocab)
    if kind == "unigram":
        vocab += [["ab", -1.0], ["abb", -1.0]]
    else:
        vocab |= {"ab": size, "abb": size + 1}
        document["model"]["merges"] += [["a", "b"], ["ab", "b"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "[PAD]"}')
    changes = {"tokenizer_dir": str(tmp_path), "vocab_size": size, "eos_token_ids": [2, size + 40]}
    smaller = msgspec.structs.replace(info, **changes)
    text = TextProcessor.from_dir(tmp_path)
    assert text.greatest_id >= size + 2
    matcher = Grammars(smaller).matcher(Grammar("regex", "(ab)*"), None)
    logits = torch.zeros(1, size)
    Masks().apply(logits, [0], [matcher])
    a, end = text.token_id("a"), text.token_id("</s>")
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == sorted([a, end])


def test_an_end_that_the_model_has_no_row_for_is_none(tmp_path: Path) -> None:
    """Nothing downstream meets it: neither the sampler, nor the ends that a version keeps."""
    directory = toys.make_text_model(tmp_path / "model")
    (directory / "generation_config.json").write_text('{"eos_token_id": [128009, 2, 3]}')
    base = load_base(str(directory), torch.device("cpu"), torch.float32, tmp_path)
    assert base.info.eos_token_ids == [2, 3]
    assert TextProcessor.from_dir(base.info.tokenizer_dir or "").end_tokens() == [2, 3]
