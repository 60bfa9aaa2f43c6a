"""What tests of rows share: a tokenizer of single characters, and data files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, processors

from graftwork_server.text import TextProcessor

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def make_tokenizer(folder: Path, *, bos: bool = True, eos: str = "</s>", template: str | None = CHAT_TEMPLATE) -> Path:
    """Saves a tokenizer with one token for each ASCII character; returns its folder."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<pad>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_text(folder: Path, **settings: Any) -> TextProcessor:
    """A TextProcessor over make_tokenizer's files."""
    return TextProcessor.from_dir(make_tokenizer(folder, **settings))


def jsonl(rows: Iterable[Any]) -> list[bytes]:
    """Rows as the lines of a file."""
    return [json.dumps(row).encode() + b"\n" for row in rows]


def copy_task(count: int) -> list[dict[str, str]]:
    """Rows that a small model learns quickly."""
    return [{"prompt": f"{index % 7} ->", "completion": "abcdefg"[index % 7] * 3} for index in range(count)]
