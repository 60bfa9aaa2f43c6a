"""What the files of a tokenizer say, beside how text is cut: tokens with a name, added tokens, chat templates.

The reference is transformers' AutoTokenizer. Of the base model it is asked itself, by the engine at its start, which
writes the answer with write_base_tokenizer: everything stands there in the simplest form. An adapter's files are read
here as they are, with the rules that AutoTokenizer has for them; a test compares the two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from graftwork_server.text.class_tokens import CLASS_TOKENS

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
"""Of several templates, the one that is taken where the request has tools."""
_FACTS = "model_facts.json"
_TEMPLATES = "additional_chat_templates"


class ModelFacts(msgspec.Struct, frozen=True):
    """What of the base model itself decides which tokens may be used, and which end a sequence."""

    eos_token_ids: list[int] = []
    """By generation_config.json, or else config.json."""
    embedding_rows: int = 0
    """Token ids that the model knows; 0: not known."""


NO_FACTS = ModelFacts()


class TokenizerFiles(msgspec.Struct, frozen=True):
    """Where the files are that say how text and tokens belong together; None for what there is not."""

    tokenizer: Path | None
    config: Path | None
    template: Path | None
    special_tokens_map: Path | None = None
    facts: Path | None = None
    """Only beside the base model's."""
    named_templates: dict[str, Path] = {}
    """Chat templates beside the default, by name."""

    @classmethod
    def of(cls, folder: Path) -> TokenizerFiles:
        """The files that `folder` has."""

        def found(name: str) -> Path | None:
            return folder / name if (folder / name).is_file() else None

        return cls(
            found("tokenizer.json"),
            found("tokenizer_config.json"),
            found("chat_template.jinja"),
            found("special_tokens_map.json"),
            found(_FACTS),
            # An artifact has no folders: there, additional_chat_templates.NAME.jinja is such a file.
            {
                path.stem.removeprefix(f"{_TEMPLATES}."): path
                for pattern in (f"{_TEMPLATES}/*.jinja", f"{_TEMPLATES}.*.jinja")
                for path in sorted(folder.glob(pattern))
            },
        )

    def read_config(self) -> dict[str, Any]:
        """tokenizer_config.json as transformers completes it: special_tokens_map.json counts where the added tokens do
        not stand in the configuration, and what neither names is as the tokenizer's class has it."""
        config: dict[str, Any] = json.loads(self.config.read_text("utf-8")) if self.config else {}
        if self.special_tokens_map and "added_tokens_decoder" not in config:
            config |= json.loads(self.special_tokens_map.read_text("utf-8"))
        class_name = config.get("tokenizer_class")
        defaults = CLASS_TOKENS.get(class_name.removesuffix("Fast"), {}) if isinstance(class_name, str) else {}
        return {**defaults, **config}

    def read_templates(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Chat templates by name. Files of their own count before those of the configuration."""
        templates = {name: path.read_text("utf-8") for name, path in self.named_templates.items()}
        if self.template:
            templates[DEFAULT_TEMPLATE] = self.template.read_text("utf-8")
        return templates or templates_of(config.get("chat_template"))

    def read_facts(self) -> ModelFacts:
        """What is known of the base model; nothing where the files are not the base's."""
        return msgspec.json.decode(self.facts.read_bytes(), type=ModelFacts) if self.facts else NO_FACTS


def templates_of(written: Any) -> dict[str, str]:
    """tokenizer_config.json writes one template as text, several as a list of named ones."""
    if isinstance(written, str):
        return {DEFAULT_TEMPLATE: written}
    if isinstance(written, list):
        written = {entry.get("name"): entry.get("template") for entry in written if isinstance(entry, Mapping)}
    if not isinstance(written, Mapping):
        return {}
    return {name: source for name, source in written.items() if isinstance(name, str) and isinstance(source, str)}


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their like, and what else the model names (image_token), as far as there are any."""
    extra = config.get("extra_special_tokens")
    own = dict(extra) if isinstance(extra, Mapping) else {}
    own |= {key: value for key, value in config.items() if isinstance(key, str) and key.endswith("_token")}
    names = (*NAMED_TOKENS, *(key for key in own if key not in NAMED_TOKENS))
    return {name: text for name in names if (text := token_content(own.get(name))) is not None}


def token_content(token: Any) -> str | None:
    """tokenizer_config.json writes a token as its text or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def add_missing_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Adds what `config` declares and `tokenizer` has not, in transformers' order, which gives the ids."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        content = token_content(entry)
        if content and content not in known:
            flags = {flag: bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            tokenizer.add_tokens([AddedToken(content, special=bool(entry.get("special")), **flags)])
            known.add(content)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    others = [] if isinstance(extra, Mapping) else [token_content(token) for token in extra]
    missing = [text for text in (*named.values(), *others) if text and text not in known]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in dict.fromkeys(missing)])


def write_base_tokenizer(
    folder: Path, tokenizer: str, named: Mapping[str, str], templates: Mapping[str, str], facts: ModelFacts
) -> None:
    """Writes what was resolved of the base model, `tokenizer` as tokenizer.json has it, for TokenizerFiles to read.

    Files that are as they should be are left alone, so that a start with a full disk writes nothing.
    """
    config = {**named, "chat_template": [{"name": name, "template": text} for name, text in templates.items()]}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    contents = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps(config),
        _FACTS: msgspec.json.encode(facts).decode(),
    }
    for name, content in contents.items():
        data, path = content.encode(), folder / name
        if path.is_file() and path.read_bytes() == data:
            continue
        beside = folder / f"{name}.new"
        beside.write_bytes(data)
        os.replace(beside, path)
