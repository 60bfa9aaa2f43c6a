"""Tokenizers and templates that come with adapters: used where they fit, refused where not, and never dangerous."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import toys
from tokenizers import AddedToken, Tokenizer

from graftwork_server.adapter_text import AdapterTexts
from graftwork_server.errors import FailedPrecondition, InvalidArgument
from graftwork_server.template_process import TemplateProcess
from graftwork_server.text import TextProcessor

MESSAGES = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    toys.save_tokenizer(folder)
    return folder


@pytest.fixture
def texts(base_dir: Path) -> Iterator[AdapterTexts]:
    made = AdapterTexts(TextProcessor.from_dir(base_dir), str(base_dir), vocab_size=320)
    yield made
    made.close()


def read(texts: AdapterTexts, folder: Path) -> TextProcessor:
    text = texts.read(folder)
    assert text is not None
    return text


def test_nothing_of_its_own_is_the_base(texts: AdapterTexts, base_dir: Path, tmp_path: Path) -> None:
    assert texts.of("sha256:a", tmp_path) is texts.base
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base_dir / name).exists():
            shutil.copy(base_dir / name, tmp_path)
    assert texts.of("sha256:b", tmp_path) is texts.base


def test_a_template_of_its_own(texts: AdapterTexts, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}{% endfor %}{{ eos_token }}")
    text = read(texts, tmp_path)
    assert text.render_chat(MESSAGES, True) == "[the fox</s>"
    assert text.template_is_slow
    assert text.encode("the fox") == texts.base.encode("the fox")  # type: ignore[union-attr]
    messages = [*MESSAGES, {"role": "assistant", "content": "so"}]
    assert text.decode(text.encode_chat(messages, continue_final_message=True)) == "[the fox[so"
    assert texts.of("sha256:c", tmp_path) is texts.of("sha256:c", tmp_path)


def test_a_template_in_the_configuration(texts: AdapterTexts, tmp_path: Path, base_dir: Path) -> None:
    config: dict[str, Any] = {"eos_token": "<|user|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = read(texts, tmp_path)
    assert text.eos_token_id == 3
    assert text.render_chat(MESSAGES, True) == "<|user|>the fox<|user|>\n<|assistant|>"
    assert not text.template_is_slow, "the base's own template is no stranger's"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ eos_token }}!"}))
    assert read(texts, tmp_path).render_chat(MESSAGES, True) == "<|user|>!"


def test_tokens_of_its_own_that_fit(texts: AdapterTexts, base_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(base_dir / "tokenizer.json"))
    before = tokenizer.get_vocab_size()
    assert before < 320
    tokenizer.add_special_tokens([AddedToken("<|tool|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = read(texts, tmp_path)
    assert text.encode("<|tool|>") == [before]
    small = AdapterTexts(texts.base, str(base_dir), vocab_size=before)
    with pytest.raises(FailedPrecondition) as caught:
        small.read(tmp_path)
    assert (caught.value.reason, caught.value.violations[0].field) == ("TOKENIZER_MISMATCH", "tokenizer.json")
    assert f"ends at {before - 1}" in caught.value.message


@pytest.mark.parametrize("rule", ["normalizer", "pre_tokenizer", "decoder"])
def test_rules_of_its_own_are_refused(texts: AdapterTexts, base_dir: Path, tmp_path: Path, rule: str) -> None:
    document = json.loads((base_dir / "tokenizer.json").read_text())
    bomb = {"Regex": "(a+)+$"}
    document[rule] = {
        "normalizer": {"type": "Replace", "pattern": bomb, "content": "x"},
        "pre_tokenizer": {"type": "Split", "pattern": bomb, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Replace", "pattern": bomb, "content": "x"},
    }[rule]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(FailedPrecondition, match=rule) as caught:
        texts.read(tmp_path)
    assert caught.value.reason == "TOKENIZER_MISMATCH"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_damaged_files_are_refused(texts: AdapterTexts, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FailedPrecondition) as caught:
        texts.read(tmp_path)
    assert caught.value.reason == "TOKENIZER_INVALID"
    assert str(tmp_path) not in caught.value.message


def test_too_large_files_are_not_read(texts: AdapterTexts, tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(FailedPrecondition, match="at most"):
        texts.read(tmp_path)


HOSTILE = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set s = 'x' * 2000000000 %}{{ s | length }}",
    "doubling": "{% set s = 'xxxxxxxx' %}" + "{% set s = s ~ s %}" * 40 + "{{ s | length }}",
    "a large text": "{{ 'x' * 5000000 }}",
    "an endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_template_is_stopped_and_the_next_one_renders(what: str) -> None:
    process = TemplateProcess(seconds=4.0)
    try:
        template = process.compile(HOSTILE[what], {})
        with pytest.raises(InvalidArgument) as caught:
            template.render(MESSAGES, add_generation_prompt=True)
        assert caught.value.reason == "CHAT_TEMPLATE_REJECTED"
        assert (
            process.compile("{{ messages[0].content }}", {}).render(MESSAGES, add_generation_prompt=True) == "the fox"
        )
    finally:
        process.close()


def test_a_template_sees_nothing_of_the_server() -> None:
    process = TemplateProcess()
    try:
        for source in ("{{ ''.__class__.__mro__ }}", "{{ dict.__globals__ }}", "{{ raise_exception.__globals__ }}"):
            try:
                text = process.compile(source, {}).render(MESSAGES, add_generation_prompt=True)
            except InvalidArgument:
                continue
            assert text == ""
        with pytest.raises(FailedPrecondition) as caught:
            process.compile("{% for %}", {})
        assert caught.value.reason == "CHAT_TEMPLATE_BROKEN"
        with pytest.raises(FailedPrecondition):
            process.compile("x" * 300_000, {})
        with pytest.raises(InvalidArgument, match="no such role"):
            process.compile("{{ raise_exception('no such role') }}", {}).render(MESSAGES, add_generation_prompt=True)
    finally:
        process.close()
    assert process._process is None
