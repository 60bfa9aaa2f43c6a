"""Tokenizers and templates that come with adapters: used where they fit, refused where not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests import hostile, toys
from tokenizers import AddedToken, Tokenizer

from graftwork_server.errors import FailedPrecondition
from graftwork_server.text import TextProcessor, TokenizerFiles
from graftwork_server.text.strangers.adapter_text import AdapterTexts

MESSAGES = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    toys.save_tokenizer(folder)
    return folder


@pytest.fixture
def texts(base_dir: Path) -> AdapterTexts:
    return AdapterTexts(TextProcessor.from_dir(base_dir), str(base_dir), vocab_size=320)


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
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ eos_token }}!"}))
    assert read(texts, tmp_path).render_chat(MESSAGES, True) == "<|user|>!"


@pytest.mark.parametrize(
    "name", ["additional_chat_templates/tool_use.jinja", "additional_chat_templates.tool_use.jinja"]
)
def test_a_template_for_tools_beside_another(texts: AdapterTexts, tmp_path: Path, name: str) -> None:
    """As transformers writes them, and as an artifact has them, which has no folders."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{{ tools | length }} tools")
    (tmp_path / "chat_template.jinja").write_text("none")
    text = read(texts, tmp_path)
    assert text.render_chat(MESSAGES, True) == "none"
    assert text.render_chat(MESSAGES, True, tools=[{}]) == "1 tools"


def test_copies_of_the_bases_files_count_beside_a_changed_one(tmp_path: Path) -> None:
    """As for transformers, which reads the adapter's folder alone."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    toys.save_tokenizer(base)
    for folder, settings in ((base, {"eos_token": "</s>"}), (adapter, {"chat_template": "old"})):
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|user|>"}}')
        (folder / "chat_template.jinja").write_text("new {{ eos_token }}")
    texts = AdapterTexts(TextProcessor.from_dir(base), str(base), vocab_size=320)
    text = read(texts, adapter)
    assert text.named_tokens["eos_token"] == "<|user|>"
    assert text.render_chat(MESSAGES, True) == "new <|user|>"


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


RULES = {
    "a post-processor's bomb": "post_processor",
    "a token that is missing": "post_processor",
    "a normalizer's bomb": "normalizer",
    "an exponential expression": "pre_tokenizer",
    "a decoder's bomb": "decoder",
    "another model": "model.type",
    "dropout": "model.dropout",
    "a prefix that merges lack": "model.continuing_subword_prefix",
    "a long token": "a token has 2000000 characters",
}


@pytest.mark.parametrize("what", RULES)
def test_rules_of_its_own_are_refused(texts: AdapterTexts, base_dir: Path, tmp_path: Path, what: str) -> None:
    """Named, and before the library has read the file."""
    document = json.loads((base_dir / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(hostile.TOKENIZERS[what](document)))
    with pytest.raises(FailedPrecondition, match=RULES[what]) as caught:
        texts.read(tmp_path)
    assert caught.value.reason == "TOKENIZER_MISMATCH"


def test_what_older_versions_of_the_library_left_out_is_no_difference(
    texts: AdapterTexts, base_dir: Path, tmp_path: Path
) -> None:
    document = json.loads((base_dir / "tokenizer.json").read_text())
    del document["pre_tokenizer"]["use_regex"]
    for name in ("type", "dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"):
        document["model"].pop(name, None)
    document["model"]["continuing_subword_prefix"] = document["model"]["end_of_word_suffix"] = ""
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    text = read(texts, tmp_path)
    assert texts.base is not None
    assert text.to_json() == texts.base.to_json()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": 3}'),
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


@pytest.mark.parametrize("what", ["tokenizer", "rule", "configuration"])
def test_running_out_of_memory_is_no_damaged_file(
    texts: AdapterTexts, base_dir: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The helper says then that a limit was gone over, and who sent the file is marked."""

    class NoMemory:
        @staticmethod
        def from_str(document: str) -> Tokenizer:
            raise MemoryError

    def read_config(files: TokenizerFiles) -> dict[str, Any]:
        raise MemoryError

    document = json.loads((base_dir / "tokenizer.json").read_text())
    document["added_tokens"][-1]["content"] = "<|own|>"
    if what == "rule":
        del document["pre_tokenizer"]["use_regex"]  # so the library is asked whether it says the same
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    if what == "configuration":
        monkeypatch.setattr(TokenizerFiles, "read_config", read_config)
    else:
        monkeypatch.setattr("graftwork_server.text.strangers.adapter_text.Tokenizer", NoMemory)
    with pytest.raises(MemoryError):
        texts.read(tmp_path)
