"""What a hostile stranger would send: chat templates, tokenizers, patterns, grammars and data sets made to hurt. No
test of itself; tests, the fuzzer and benchmarks import it, so that each input stands in one place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

Document = dict[str, Any]

TEMPLATES: dict[str, str] = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set s = 'x' * 2000000000 %}{{ s | length }}",
    "doubling": "{% set s = 'xxxxxxxx' %}" + "{% set s = s ~ s %}" * 40 + "{{ s | length }}",
    "a large text": "{{ 'x' * 5000000 }}",
    "many tokens": "{{ 'a b ' * 1000000 }}",
    "an endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a large power": "{{ (10 ** 10 ** 9) | length }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a large list": "{{ range(99999) | list | sum }}" + "{% set ns = namespace(l=[1]) %}"
    "{% for a in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l | length }}",
    "deep JSON": "{% set ns = namespace(l=[]) %}{% for a in range(99999) %}{% set ns.l = [ns.l] %}{% endfor %}"
    "{{ ns.l | tojson }}",
    "half a character": "{{ '\\ud800' }}",
}
"""Chat templates; none of them gives a text that a client may have."""

LOOPING = TEMPLATES["endless loops"]
"""A template that keeps a processor busy for minutes."""
LOOPS = (
    LOOPING,
    "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    "{{ (range(99999) | list) * 999 }}",
)
"""Templates that take as much time or memory as they may, in four ways."""
HARMLESS = "{% for m in messages %}{{ m.content }}{% endfor %}"


EXPONENTIAL = "(a+)+$"
"""A regular expression that takes twice as long for each further letter."""
PATTERNS: dict[str, str] = {
    "recursion": "(?R)",
    "repeats of repeats": r"(([a-z_.0-9]*)*)*!",
    "many repeats": r"(.*)*(.*)*(.*)*x",
    "a large automaton": "(a|b|[c-z.]{0,9}){500}",
}
"""Patterns of module names, as in `target_modules`, that take long or are none."""


def costly_grammar(number: int) -> dict[str, str]:
    """One of four grammars that take long: for a first mask, in a step, in the lexer, in the parser.

    No two numbers have the same one, so that none is remembered.
    """
    endless = f"(abcdefghijklmnopqrstuvwxyz{number}){{60000}}"
    terminals = range(900)
    return [
        {"regex": endless},
        {"regex": "[a-z]{20}" + endless},
        {"regex": "(a|b|[c-z]{0,9})" * 500 + str(number)},
        {
            "lark": "start: "
            + "|".join(f"T{index}" for index in terminals)
            + "".join(f"\nT{index}: /[a-z]+{index}x{number}/" for index in terminals)
        },
    ][number % 4]


def post_processor_bomb(document: Document, pieces: int = 3000, ids: int = 3000) -> Document:
    """A tokenizer whose post-processor puts `pieces` times `ids` tokens around each text: 177 KB that take 1.8 GB."""
    token = next(iter(_vocab(document)))
    special = {"id": "[B]", "ids": [0] * ids, "tokens": [token] * ids}
    single = [{"SpecialToken": {"id": "[B]", "type_id": 0}}] * pieces + [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return _changed(
        document,
        post_processor={
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": {"[B]": special},
        },
    )


def missing_token_in_post_processor(document: Document) -> Document:
    """The post-processor names a token that it does not have: a panic at the first text."""
    single = [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    return _changed(document, post_processor=processor)


def prefix_that_merges_lack(document: Document) -> Document:
    """A panic when the file is read."""
    return _changed_model(document, continuing_subword_prefix="##################")


def replacing_normalizer(document: Document) -> Document:
    """Each character becomes a megabyte."""
    return _changed(document, normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * (1 << 20)})


def regex_pre_tokenizer(document: Document) -> Document:
    """A regular expression that takes exponential time."""
    rule = {"type": "Split", "pattern": {"Regex": EXPONENTIAL}, "behavior": "Isolated", "invert": False}
    return _changed(document, pre_tokenizer=rule)


def replacing_decoder(document: Document) -> Document:
    """Each token becomes a megabyte of text."""
    return _changed(document, decoder={"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * (1 << 20)})


def other_model(document: Document) -> Document:
    """Another kind of model over the same tokens."""
    vocab = _vocab(document)
    return _changed(document, model={"type": "WordLevel", "vocab": vocab, "unk_token": next(iter(vocab))})


def dropout(document: Document) -> Document:
    """The same text has other tokens each time."""
    return _changed_model(document, dropout=0.5)


def long_added_token(document: Document, characters: int = 2_000_000) -> Document:
    """One added token as large as the file may be."""
    return with_added(document, ["x" * characters])


def spaced_added_token(document: Document) -> Document:
    """A token that takes the spaces around it: looking for them in a long text of spaces is quadratic."""
    return with_added(document, ["~"], lstrip=True, rstrip=True, normalized=True)


def many_added_tokens(document: Document, count: int = 50_000) -> Document:
    """More tokens than the model has rows."""
    return with_added(document, [f"<|{number}|>" for number in range(count)])


def ids_beyond(document: Document) -> Document:
    """A token whose id is four thousand million."""
    return _changed_model(document, vocab=_vocab(document) | {"far beyond": (1 << 32) - 1})


def one_token_twice(document: Document) -> Document:
    """Two ids for one text."""
    changed = with_added(document, ["<|twice|>"], first=_next_id(document))
    added = changed["added_tokens"]
    added.append(added[-1] | {"id": added[-1]["id"] + 1})
    return changed


def with_added(document: Document, contents: list[str], first: int | None = None, **flags: bool) -> Document:
    """`document` with more added tokens, special ones unless the flags say otherwise."""
    first = _next_id(document) if first is None else first
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = [plain | {"id": first + index, "content": content} | flags for index, content in enumerate(contents)]
    return _changed(document, added_tokens=[*document.get("added_tokens", []), *more])


def with_first_added(document: Document, **values: Any) -> Document:
    """`document` whose first added token has other properties."""
    first, *others = document["added_tokens"]
    return _changed(document, added_tokens=[first | values, *others])


TOKENIZERS: dict[str, Callable[[Document], Document]] = {
    "a post-processor's bomb": post_processor_bomb,
    "a larger bomb": lambda document: post_processor_bomb(document, 30_000, 20_000),
    "a token that is missing": missing_token_in_post_processor,
    "a prefix that merges lack": prefix_that_merges_lack,
    "a normalizer's bomb": replacing_normalizer,
    "an exponential expression": regex_pre_tokenizer,
    "a decoder's bomb": replacing_decoder,
    "another model": other_model,
    "dropout": dropout,
    "a long token": long_added_token,
    "many tokens": many_added_tokens,
    "ids far beyond": ids_beyond,
}
"""From a good tokenizer.json (as data) to one that must be refused when it is uploaded."""


def slow_rows(messages: int = 1000, rows: int = 1) -> bytes:
    """A data set of long conversations: a template that shows no spans is rendered twice for each message."""
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": "word"} for index in range(messages)]
    return (json.dumps({"messages": turns}) + "\n").encode() * rows


def costly_rows(number: int, size: int) -> bytes:
    """About `size` bytes: one text without a space, rows that are all wrong, JSON that is nested, or accents alone."""
    return [
        json.dumps({"text": "a" * size}).encode(),
        b'{"text": 1}\n' * (size // 12),
        b'{"text": ' + b"[" * size,
        json.dumps({"text": "\u0300" * (size // 6)}).encode(),
    ][number % 4]


def plain_rows(size: int) -> bytes:
    """A good data set of about `size` bytes."""
    row = json.dumps({"prompt": "the quick brown fox", "completion": " jumps over the lazy dog"}).encode() + b"\n"
    return row * (size // len(row) + 1)


def _vocab(document: Document) -> dict[str, int]:
    vocab = document["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}


def _next_id(document: Document) -> int:
    ids: list[int] = [*_vocab(document).values(), *(token["id"] for token in document.get("added_tokens", []))]
    return max(ids) + 1


def _changed(document: Document, **values: Any) -> Document:
    return copy.deepcopy(document) | values


def _changed_model(document: Document, **values: Any) -> Document:
    return _changed(document, model=document["model"] | values)
