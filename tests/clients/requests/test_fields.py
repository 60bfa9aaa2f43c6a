"""Arguments that no message can hold are named, with what would be accepted; nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.clients.scripted_server import ScriptedServer

import graftwork

Call = Callable[[Any], Any]

WRONG: list[tuple[Call, type[Exception], str]] = [
    (lambda c: c.generate("base", [1, -1]), ValueError, "prompt[1] is -1; an integer from 0 to 4294967295"),
    (lambda c: c.generate("base", [1, "a"]), TypeError, "prompt[1] is 'a'; an integer from 0 to 4294967295"),
    (lambda c: c.generate("base", ["a", 7.5]), TypeError, "prompt is 7.5; a text or a list of token ids"),
    (lambda c: c.generate("base", ["a", "b"], stream=True), ValueError, "stream=True takes one prompt"),
    (lambda c: c.generate("base", 7), TypeError, "prompt is 7; a text or a list of token ids is accepted"),
    (lambda c: c.classify("base", 7), TypeError, "inputs is 7; a text, token ids, or a list of these is accepted"),
    (lambda c: c.embed("base", ["a", 7]), TypeError, "inputs[1] is 7; a text, a pair of texts, or a list of token"),
    (lambda c: c.adapters.get(7), TypeError, "adapter is 7; valid Unicode text is accepted"),
    (lambda c: c.tuning.get(7), TypeError, "job is 7; valid Unicode text is accepted"),
    (lambda c: c.adapters.delete("a@latest"), ValueError, "name the version to delete by its number"),
    (lambda c: c.generate("base", "x\ud800"), ValueError, r"prompt is 'x\ud800'; valid Unicode text is accepted"),
    (lambda c: c.generate(b"\xff", "x"), ValueError, r"model is b'\xff'; valid Unicode text is accepted"),
    (lambda c: c.generate("base", "x", seed=-1), ValueError, f"seed is -1; an integer from 0 to {2**64 - 1}"),
    (lambda c: c.generate("base", "x", max_tokens=2**40), ValueError, "an integer up to 2147483647"),
    (lambda c: c.generate("base", "x", max_tokens="5"), TypeError, "max_tokens is '5'; an integer up to 2147483647"),
    (lambda c: c.generate("base", "x", temperature="hot"), TypeError, "temperature is 'hot'; a number is accepted"),
    (lambda c: c.generate("base", "x", stop=["a", 1]), TypeError, "stop[1] is 1; valid Unicode text is accepted"),
    (
        lambda c: c.generate("base", "x", bad_words="ab"),
        TypeError,
        "bad_words is 'ab'; a list, each item valid",
    ),
    (
        lambda c: c.generate("base", "x", choice="ab"),
        TypeError,
        "choice is 'ab'; a list, each item valid",
    ),
    (lambda c: c.generate("base", "x", choice=["\udc00"]), ValueError, r"choice[0] is '\udc00'; valid Unicode text"),
    (
        lambda c: c.generate("base", "x", logit_bias={-1: 1}),
        ValueError,
        "logit_bias is {-1: 1}; a mapping of an",
    ),
    (lambda c: c.generate("base", "x", priority=2**31), ValueError, "priority is 2147483648; an integer up to"),
    (lambda c: c.chat("base", "hi"), TypeError, 'messages is a list of messages, such as [{"role": "user"'),
    (lambda c: c.chat("base", ["hi"]), TypeError, "messages is a list of messages"),
    (lambda c: c.chat("base", {"role": "user"}), TypeError, "messages is a list of messages"),
    (lambda c: c.chat("base", [{"content": "x"}]), ValueError, 'messages[0] has no "role"'),
    (lambda c: c.chat("base", [{"role": "user", "content": ["x"]}]), TypeError, "messages[0].content[0] is 'x'; {"),
    (lambda c: c.chat("base", [{"role": "user", "content": 5}]), TypeError, "messages[0].content is 5; a text is"),
    (
        lambda c: c.chat("base", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        TypeError,
        "messages[0].content[0] is {",
    ),
    (lambda c: c.score("base", [-1]), ValueError, "text[0] is -1"),
    (lambda c: c.classify("base", ["a", "\ud800"]), ValueError, r"inputs[1] is '\ud800'; valid Unicode text"),
    (lambda c: c.embed("base", [[1, -1]]), ValueError, "inputs[0][1] is -1"),
    (lambda c: c.embed("base", "a", dimensions=2**31), ValueError, "dimensions is 2147483648"),
    (lambda c: c.tokenize("\ud800"), ValueError, r"text is '\ud800'; valid Unicode text is accepted"),
    (lambda c: c.adapters.get("\ud800"), ValueError, r"adapter is '\ud800'; valid Unicode text is accepted"),
    (lambda c: next(c.adapters.list(page_size=2**31)), ValueError, "page_size is 2147483648"),
    (
        lambda c: c.tuning.create(strategy="lora", dataset="d", adapter="a", config={"r": 8, "x": {1, 2}}),
        ValueError,
        "config['x'] is {1, 2}; a JSON value is accepted",
    ),
    (
        lambda c: c.tuning.create(strategy="lora", dataset="d", adapter="a", validation_fraction="x"),
        TypeError,
        "validation_fraction is 'x'; a number is accepted",
    ),
    (
        lambda c: c.tuning.create(strategy="lora", dataset=[{"prompt": "a", "completion": "b"}], adapter="a"),
        TypeError,
        "a stored data set or its id is accepted: client.datasets.upload(...) returns one",
    ),
    (
        lambda c: c.tuning.create(strategy="lora", dataset="d", validation=5, adapter="a"),
        TypeError,
        "validation is 5; a stored data set or its id is accepted",
    ),
]


@pytest.mark.parametrize(("call", "kind", "words"), WRONG, ids=[words[:40] for _, _, words in WRONG])
def test_what_no_message_can_hold_is_named(
    server: ScriptedServer, client: graftwork.Client, call: Call, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as caught:
        call(client)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200
    assert server.seen == []


def test_long_values_are_cut(client: graftwork.Client) -> None:
    with pytest.raises(ValueError, match=r"^prompt is '\\ud800a{40,60}\.\.\.; valid Unicode text is accepted$"):
        client.generate("base", "\ud800" + "a" * 10_000)
