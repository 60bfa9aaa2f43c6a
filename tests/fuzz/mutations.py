"""Values that programs have fallen over, and mutations of bytes and JSON that put them somewhere."""

from __future__ import annotations

import json
import random
from typing import Any

from tests import hostile

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    7,
    255,
    2**31 - 1,
    2**31,
    -(2**31),
    2**63 - 1,
    2**64,
    10**30,
    0.5,
    -0.0,
    1e-45,
    1e308,
]
NUMBERS += [-1e308, float("nan"), float("inf"), float("-inf")]

TEXTS = [
    "",
    " ",
    "\x00",
    "a\x00b",
    "\n",
    "\x1b[31m",
    "\u202eabc",
    "\ufeff",
    "\U0001f98a" * 3,
    "e\u0301",
    "x" * 5000,
    "\u65e5\u672c" * 200,
    "../../etc/passwd",
    "base",
    "good",
    "good@1",
    "good@99",
    "base@1",
    "adapters/good/versions/1",
    "adapters/none",
    "datasets/none",
    "tuningJobs/none",
    "strategies/lora",
    "lora",
    "full",
    "q_proj",
    "all-linear",
    "</s>",
    "<s>",
    hostile.PATTERNS["recursion"],
    hostile.PATTERNS["repeats of repeats"],
    "(",
    "[[:alpha:]]",
    "%s%n%x",
    "{{ 7 * 7 }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "[" * 3000,
    '{"a": "\\ud800"}',
    '{"type": "object", "properties": {"a": {"$ref": "#"}}}',
    json.dumps({"type": "string", "pattern": hostile.EXPONENTIAL}),
    '[{"type": "function", "function": {"name": "f", "parameters": {}}}]',
    "NaN",
    "null",
    "1e999",
    "mean",
    "user",
    "assistant",
    "tool",
]
NO_TEXTS = ["\ud800", "a\udfff", "\udc80" * 5]
"""What JSON can say and UTF-8 cannot."""

TEMPLATES = [
    "{{ messages[0]['content'] }}",
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    "{% for m in messages %}{{ m",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{{ 'x' * 100000000 }}",
    "{% for i in range(100000000) %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    hostile.TEMPLATES["an endless macro"],
    "{% include 'x' %}",
    hostile.TEMPLATES["half a character"],
    "{{ messages | tojson }}" * 50,
    "{% set x = namespace(v=[]) %}{% for i in range(3000) %}{% set x.v = x.v + [x.v] %}{% endfor %}{{ x.v }}",
    "{%- " * 1000,
]


def mutated_bytes(data: bytes, choose: random.Random) -> bytes:
    """`data` with some bytes changed, put in, taken out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 8)):
        at = choose.randrange(len(changed) + 1)
        match choose.randrange(6):
            case 0 if at < len(changed):
                changed[at] = choose.randrange(256)
            case 1:
                changed[at:at] = choose.randbytes(choose.choice((1, 1, 2, 8)))
            case 2:
                del changed[at : at + choose.choice((1, 1, 2, 30))]
            case 3:
                changed[at:at] = changed[at : at + choose.randrange(1, 40)]
            case 4 if choose.random() < 0.2:
                del changed[at:]
            case 5 if at < len(changed):
                changed[at] ^= 1 << choose.randrange(8)
    return bytes(changed)


def any_text(choose: random.Random) -> str:
    """Hostile text; a fifth of it cannot be encoded."""
    return choose.choice(NO_TEXTS if choose.random() < 0.2 else TEXTS)


def any_value(choose: random.Random, depth: int = 0) -> Any:
    """A value of any JSON kind, hostile more often than not."""
    match choose.randrange(8):
        case 0 | 1:
            return choose.choice(NUMBERS)
        case 2:
            return choose.choice(TEXTS)
        case 3:
            return choose.choice(NO_TEXTS)
        case 4:
            return choose.choice([None, True, False, [], {}])
        case 5 if depth < 3:
            return [any_value(choose, depth + 1) for _ in range(choose.choice((1, 2, 2, 50)))]
        case 6 if depth < 3:
            return {any_text(choose): any_value(choose, depth + 1) for _ in range(choose.choice((1, 3)))}
    return choose.choice(TEXTS)


def mutated_json(document: Any, choose: random.Random) -> Any:
    """`document` with values replaced, taken out, doubled or renamed at one to three places."""
    document = json.loads(json.dumps(document))
    for _ in range(choose.randint(1, 3)):
        places = list(_places(document, 2000))
        if not places:
            return any_value(choose)
        container, key = choose.choice(places)
        match choose.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[any_text(choose)] = container.pop(key)
            case 2 if isinstance(container, list):
                container[key:key] = [container[key]] * choose.choice((1, 2, 1000))
            case 3 if isinstance(container, dict):
                container[any_text(choose)] = any_value(choose)
            case _:
                container[key] = any_value(choose)
    return document


def _places(value: Any, most: int) -> list[tuple[Any, Any]]:
    """Where in `value` something can be changed: containers with a key of theirs, nearest first."""
    found: list[tuple[Any, Any]] = []
    level = [value] if isinstance(value, dict | list) else []
    while level and len(found) < most:
        here = [(c, key) for c in level for key in (list(c) if isinstance(c, dict) else range(len(c)))]
        found += here
        level = [c[key] for c, key in here if isinstance(c[key], dict | list)]
    return found[:most]


def written(document: Any, choose: random.Random) -> bytes:
    """JSON of `document`, sometimes as nobody writes it: raw surrogates, doubled keys, other encodings."""
    text = json.dumps(document, ensure_ascii=choose.random() < 0.7)
    if choose.random() < 0.1:
        text = text.replace("{", '{"peft_type": 1, "peft_type": 2, ', 1)
    return text.encode(choose.choice(("utf-8",) * 9 + ("utf-16",)), "surrogatepass")
