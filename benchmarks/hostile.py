"""Requests that are made to cost others as much as they can, each kind beside ordinary ones of the same size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork import Client

PROMPT = list(range(100, 164))
CHAT = [{"role": "user", "content": "hello there"}]
OTHERS_TOKENS = 8
"""At most as many for each request of the others; most hostile ones end before."""
DATA_BYTES = 370_000
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
_ENDLESS = "(abcdefghijklmnopqrstuvwxyz%d){60000}"
_LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    "{{ (range(99999) | list) * 999 }}",
)

Attack = Callable[[Client, int], None]
"""Sends one request, which may be refused; the number is new each time, so that no answer is remembered."""


class Refused(Exception):
    """What was sent is not valid, says the answer."""


@dataclass(frozen=True)
class Kind:
    """Two clients' ways: `hostile` must cost others less than twice what `ordinary` does."""

    name: str
    ordinary: Attack
    hostile: Attack


class Files:
    """Adapters in folders of their own under `folder`, made from one that the server takes."""

    def __init__(self, adapter: Path, tokenizer: Path, folder: Path) -> None:
        self._adapter, self._folder = adapter, folder
        self._config = json.loads((adapter / "adapter_config.json").read_text())
        self._tokenizer = json.loads(tokenizer.read_text())

    def make(
        self,
        name: str,
        *,
        template: str | None = None,
        tokenizer: dict[str, Any] | None = None,
        targets: str | None = None,
    ) -> Path:
        """An adapter's folder with a chat template, a changed tokenizer, or a pattern of target modules."""
        folder = self._folder / name
        shutil.copytree(self._adapter, folder, dirs_exist_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(json.dumps(self._tokenizer | tokenizer))
        if targets is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self._config | {"target_modules": targets}))
        return folder

    def with_post_processor(self, name: str, pieces: int, ids: int) -> Path:
        """A tokenizer that puts so many pieces of so many tokens each before every text."""
        special = {"id": "x", "ids": [5] * ids, "tokens": ["a"] * ids}
        single = [{"SpecialToken": {"id": "x", "type_id": 0}}] * pieces + [{"Sequence": {"id": "A", "type_id": 0}}]
        processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"x": special}}
        return self.make(name, tokenizer={"post_processor": processor})

    def with_model(self, name: str, **changes: Any) -> Path:
        """A tokenizer whose model has other parameters."""
        return self.make(name, tokenizer={"model": self._tokenizer["model"] | changes})

    def with_token(self, name: str, **changes: Any) -> Path:
        """A tokenizer whose first added token has other properties."""
        added = [dict(token) for token in self._tokenizer["added_tokens"]]
        added[0] |= changes
        return self.make(name, tokenizer={"added_tokens": added})


def kinds(files: Files, client: Client, clients: int) -> list[Kind]:
    """Every kind; the adapters that chats need are uploaded with `client`, one for each of so many clients."""
    for index in range(clients):
        template = _LOOPS[index % len(_LOOPS)]
        client.adapters.create(f"looping-{index}", files.make(f"looping-{index}", template=template))
        client.adapters.create(f"chatting-{index}", files.make(f"chatting-{index}", template=TEMPLATE + " "))
    bombs = [
        files.with_post_processor("pieces", 3000, 3000),
        files.with_post_processor("more-pieces", 30000, 20000),
        files.with_model("prefix", continuing_subword_prefix="##"),
        files.with_token("long-token", content="a" * 100_000),
    ]
    plain = [files.make("plain", tokenizer={}), files.with_token("other-token", lstrip=True)]
    patterns = ["(?R)", r"(([a-z_.0-9]*)*)*!", r"(.*)*(.*)*(.*)*x", "(a|b|[c-z.]{0,9}){500}"]
    bad = [files.make(f"pattern-{index}", targets=pattern) for index, pattern in enumerate(patterns)]
    good = [files.make("pattern", targets=r".*\.(q_proj|nothing)")]
    return [
        Kind("grammars", _generate(ordinary_grammar), _generate(hostile_grammar)),
        Kind("templates", _chat("chatting", clients), _chat("looping", clients)),
        Kind("tokenizers", _upload(plain), _upload(bombs)),
        Kind("patterns", _upload(good), _upload(bad)),
        Kind("data checks", _validate(ordinary_rows), _validate(hostile_rows)),
    ]


def ordinary_grammar(number: int) -> dict[str, Any]:
    """A JSON schema of thirty required properties, all new."""
    properties = {f"field_{number}_{index}": {"enum": ["a", "b", str(index)]} for index in range(30)}
    return {"json_schema": {"type": "object", "properties": properties, "required": list(properties)}}


def hostile_grammar(number: int) -> dict[str, Any]:
    """One of four grammars that take long: for a first mask, in a step, in the lexer, in the parser."""
    terminals = range(900)
    return [
        {"regex": _ENDLESS % number},
        {"regex": "[a-z]{20}" + _ENDLESS % number},
        {"regex": "(a|b|[c-z]{0,9})" * 500 + str(number)},
        {
            "lark": "start: "
            + "|".join(f"T{index}" for index in terminals)
            + "".join(f"\nT{index}: /[a-z]+{index}x{number}/" for index in terminals)
        },
    ][number % 4]


def ordinary_rows(number: int) -> bytes:
    """DATA_BYTES of rows as people have them."""
    row = {"prompt": f"What is the capital of country {number}?", "completion": "A town of some size, by a river."}
    line = json.dumps(row).encode() + b"\n"
    return line * (DATA_BYTES // len(line))


def hostile_rows(number: int) -> bytes:
    """As many bytes: one text without a space, rows that are all wrong, JSON that is nested, or empty lines."""
    size = DATA_BYTES - 100
    return [
        json.dumps({"text": "a" * size}).encode(),
        b'{"text": 1}\n' * (size // 12),
        b'{"text": ' + b"[" * size,
        json.dumps({"text": "\u0300" * (size // 6)}).encode(),
    ][number % 4]


def _generate(grammar: Callable[[int], dict[str, Any]]) -> Attack:
    def send(client: Client, number: int) -> None:
        client.generate("base", PROMPT, max_tokens=OTHERS_TOKENS, **grammar(number))

    return send


def _chat(name: str, adapters: int) -> Attack:
    def send(client: Client, number: int) -> None:
        client.chat(f"{name}-{number % adapters}", CHAT, max_tokens=OTHERS_TOKENS)

    return send


def _upload(folders: list[Path]) -> Attack:
    def send(client: Client, number: int) -> None:
        client.adapters.create(f"upload-{number}", folders[number % len(folders)])
        try:
            client.tokenize("hello there", model=f"upload-{number}")
        finally:
            client.adapters.delete(f"upload-{number}")

    return send


def _validate(rows: Callable[[int], bytes]) -> Attack:
    def send(client: Client, number: int) -> None:
        if not client.datasets.validate(rows(number)).valid:
            raise Refused

    return send
