"""What a checkpoint's tokenizer files say, against transformers' AutoTokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.server.text.text_harness import chat
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from graftwork_server.base.tokenizer import resolved_tokenizer
from graftwork_server.errors import FailedPrecondition
from graftwork_server.text import ModelFacts, TextProcessor
from graftwork_server.text.class_tokens import CLASS_TOKENS
from graftwork_server.text.files import NAMED_TOKENS

TEXTS = ["the fox", " fox", "fox\n the", "a<|endoftext|>b</s> c<eos>", "Gr\u00fc\u00dfe \U0001f98a", "x [PAD] y"]
PLAIN = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}{{ image_token }}"
TOOLS = "{{ tools | tojson }}" + PLAIN
A_TOOL: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def byte_level() -> Tokenizer:
    specials = ["<|endoftext|>", "<|padding|>", "<s>", "</s>"]
    alphabet = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "\u0120f", "\u0120fox"]
    merges = [("t", "h"), ("th", "e"), ("\u0120", "f")]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(alphabet)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def sentencepiece() -> Tokenizer:
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<bos>", "<eos>", "<mask>"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz\n"]
    pieces += ["\u2581t", "he", "\u2581the", "\u2581f"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "f")]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, files: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def config(**fields: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": fields}


GPT2: dict[str, Any] = {"config.json": {"model_type": "gpt2"}}
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("gpt2 by the model's type", byte_level, GPT2 | config(model_max_length=1024)),
    ("no tokenizer_config.json", byte_level, GPT2),
    ("qwen2", byte_level, {"config.json": {"model_type": "qwen2"}} | config(tokenizer_class="Qwen2Tokenizer")),
    ("codegen", byte_level, {"config.json": {"model_type": "codegen"}} | config(tokenizer_class="CodeGenTokenizer")),
    ("gpt-neox", byte_level, {"config.json": {"model_type": "gpt_neox"}} | config(tokenizer_class="GPTNeoXTokenizer")),
    ("gemma", sentencepiece, {"config.json": {"model_type": "gemma"}} | config(tokenizer_class="GemmaTokenizer")),
    ("llama", sentencepiece, {"config.json": {"model_type": "llama"}} | config(tokenizer_class="LlamaTokenizer")),
    (
        "llama, old and with flags",
        sentencepiece,
        {"config.json": {"model_type": "llama"}}
        | config(tokenizer_class="LlamaTokenizer", legacy=True, add_bos_token=False, add_eos_token=True),
    ),
    (
        "a class that says nothing",
        byte_level,
        {"config.json": {"model_type": "llama"}} | config(tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>"),
    ),
    (
        "special_tokens_map.json",
        byte_level,
        {
            "config.json": {"model_type": "llama"},
            "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
        }
        | config(tokenizer_class="PreTrainedTokenizerFast"),
    ),
    (
        "special_tokens_map.json beside added tokens",
        byte_level,
        {"special_tokens_map.json": {"eos_token": "<s>"}}
        | config(
            tokenizer_class="PreTrainedTokenizerFast",
            eos_token="</s>",
            added_tokens_decoder={"264": {"content": "[PAD]", "special": True}, "265": {"content": "<x>"}},
        ),
    ),
    (
        "tokens of its own",
        byte_level,
        GPT2 | config(pad_token="[PAD]", image_token="<image>", additional_special_tokens=["<a>", "<b>"]),
    ),
    ("one template", byte_level, GPT2 | config(chat_template=PLAIN)),
    (
        "templates in a list",
        byte_level,
        GPT2
        | config(
            chat_template=[
                {"name": "rag", "template": "rag"},
                {"name": "tool_use", "template": TOOLS},
                {"name": "default", "template": PLAIN},
            ]
        ),
    ),
    ("a template's file", byte_level, GPT2 | config(chat_template="old") | {"chat_template.jinja": PLAIN}),
    (
        "templates' files",
        byte_level,
        GPT2 | {"chat_template.jinja": PLAIN, "additional_chat_templates/tool_use.jinja": TOOLS},
    ),
]


def same_as_transformers(ours: TextProcessor, theirs: Any) -> None:
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode_plain(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    assert ours.named_tokens == theirs.special_tokens_map
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    if theirs.chat_template is None:
        assert not ours.has_chat_template
        return
    for tools in (None, A_TOOL):
        expected = theirs.apply_chat_template(chat("the", "fox"), tools=tools, tokenize=False)
        assert ours.render_chat(chat("the", "fox"), False, tools=tools) == expected


@pytest.mark.parametrize(("make", "files"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_base_is_as_transformers_resolves_it(tmp_path: Path, make: Any, files: dict[str, Any]) -> None:
    folder = write(tmp_path / "model", make(), files)
    facts = ModelFacts([7, 3], 300)
    resolved = resolved_tokenizer(str(folder), tmp_path / "cache", "sha256:ab", facts)
    assert resolved is not None
    ours = TextProcessor.from_dir(resolved)
    same_as_transformers(ours, AutoTokenizer.from_pretrained(folder))
    assert ours.facts == facts
    before = {path: path.stat().st_mtime_ns for path in Path(resolved).iterdir()}
    assert resolved_tokenizer(str(folder), tmp_path / "cache", "sha256:ab", facts) == resolved
    assert {path: path.stat().st_mtime_ns for path in Path(resolved).iterdir()} == before


# Classes that cut text in their own way whatever tokenizer.json says; of an adapter, that is the base's to say.
READ_AS_THEY_ARE = [case for case in CASES if case[1] is byte_level and "config.json" in case[2]]


@pytest.mark.parametrize(
    ("make", "files"), [case[1:] for case in READ_AS_THEY_ARE], ids=[case[0] for case in READ_AS_THEY_ARE]
)
def test_an_adapters_files_say_what_transformers_reads(tmp_path: Path, make: Any, files: dict[str, Any]) -> None:
    class_name = {"gpt2": "GPT2Tokenizer"}.get(files["config.json"]["model_type"])
    settings = files.get("tokenizer_config.json", {})
    if class_name:
        settings = {"tokenizer_class": class_name, **settings}
    folder = write(tmp_path / "adapter", make(), files | {"tokenizer_config.json": settings})
    same_as_transformers(TextProcessor.from_dir(folder), AutoTokenizer.from_pretrained(folder))


def test_templates_without_a_default_say_which_there_are(tmp_path: Path) -> None:
    files = config(chat_template=[{"name": "tool_use", "template": TOOLS}, {"name": "rag", "template": "x"}])
    text = TextProcessor.from_dir(write(tmp_path, byte_level(), files))
    assert text.render_chat(chat("fox"), False, tools=A_TOOL).startswith("[{")
    with pytest.raises(FailedPrecondition, match="only: rag, tool_use"):
        text.render_chat(chat("fox"), False)


@pytest.mark.parametrize("name", sorted(CLASS_TOKENS))
def test_the_table_of_classes_is_transformers_own(name: str) -> None:
    parameters = inspect.signature(tokenizer_class_from_name(name).__init__).parameters
    defaults = {token: parameters[token].default for token in NAMED_TOKENS if token in parameters}
    assert CLASS_TOKENS[name] == {token: str(value) for token, value in defaults.items() if value is not None}


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert resolved_tokenizer(str(tmp_path), tmp_path / "cache", "sha256:ab", ModelFacts()) is None


def test_a_tokenizer_with_code_of_its_own_is_read_from_its_file(tmp_path: Path) -> None:
    files = config(auto_map={"AutoTokenizer": ["code.Slow", "code.Fast"]}, tokenizer_class="Strange", eos_token="</s>")
    folder = write(tmp_path / "model", byte_level(), files)
    resolved = resolved_tokenizer(str(folder), tmp_path / "cache", "sha256:ab", ModelFacts([1], 300))
    assert resolved is not None
    text = TextProcessor.from_dir(resolved)
    assert text.encode("the fox") == byte_level().encode("the fox").ids
    assert (text.eos_token_id, text.facts.eos_token_ids) == (3, [1])


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", byte_level(), config(tokenizer_class="PreTrainedTokenizerFast"))
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(FailedPrecondition) as caught:
        resolved_tokenizer(str(folder), tmp_path / "cache", "sha256:ab", ModelFacts())
    assert caught.value.reason == "DATA_DIR_UNUSABLE"
