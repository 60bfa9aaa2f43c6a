"""What the tests of data sets share: a row of each form, and a text with facts of a model."""

from __future__ import annotations

from graftwork_server.text import ModelFacts, TextProcessor

PAIR = {"prompt": "ab", "completion": "cd"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
TASK = {"instruction": "up", "input": "ab", "output": "AB"}
TEXT = {"text": "abc"}


def with_facts(text: TextProcessor, **facts: object) -> TextProcessor:
    text.facts = ModelFacts(**facts)  # type: ignore[arg-type]
    return text
