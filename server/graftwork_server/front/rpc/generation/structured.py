"""StructuredOutput as the engine takes it: sizes checked here, the rest by the compiler."""

from __future__ import annotations

import json
from typing import Any

from graftwork.v1 import generation_pb2 as pb
from graftwork_plugins import read_json
from graftwork_server.front.rpc.limits import Violations
from graftwork_server.wire.engine import Grammar

MAX_GRAMMAR_BYTES = 64 << 10
MAX_REGEX_CHARACTERS = 8192
MAX_CHOICES = 1000
MAX_CHOICE_CHARACTERS = 1000
COMPACT_JSON = {"whitespace_flexible": False, "item_separator": ",[ ]?", "key_separator": ":[ ]?"}
"""One space or none after a comma or colon. Where white space is free, small models write nothing else."""
WHITESPACE_KEYS = {"whitespace_pattern", *COMPACT_JSON}


def grammar_of(output: pb.StructuredOutput, violations: Violations) -> Grammar | None:
    """The grammar; None, with a note of what is wrong, if there is none that can be used."""
    kind = output.WhichOneof("format")
    if kind is None:
        violations.unless(False, "structured_output", "is empty; json_schema, regex, choice or lark is accepted")
        return None
    if kind == "choice":
        texts = list(output.choice.texts)
        field = "structured_output.choice"
        violations.unless(
            1 <= len(texts) <= MAX_CHOICES, field, f"has {len(texts)} texts; 1 to {MAX_CHOICES} are accepted"
        )
        for index, text in enumerate(texts[:MAX_CHOICES]):
            what = f"has {len(text)} characters; 1 to {MAX_CHOICE_CHARACTERS} are accepted"
            violations.unless(1 <= len(text) <= MAX_CHOICE_CHARACTERS, f"{field}.texts[{index}]", what)
        source = json.dumps(list(dict.fromkeys(texts)), ensure_ascii=False)
    else:
        source = getattr(output, kind)
        field = f"structured_output.{kind}"
        violations.unless(bool(source.strip()), field, "is empty; leave structured_output out for free output")
    size = len(source.encode())
    violations.unless(size <= MAX_GRAMMAR_BYTES, field, f"has {size} bytes; at most {MAX_GRAMMAR_BYTES} are accepted")
    if kind == "regex":
        what = f"has {len(source)} characters; at most {MAX_REGEX_CHARACTERS} are accepted"
        violations.unless(len(source) <= MAX_REGEX_CHARACTERS, field, what)
    if kind == "json_schema" and size <= MAX_GRAMMAR_BYTES:
        try:
            schema = read_json(source)
        except ValueError as error:
            violations.unless(False, field, f"is no JSON: {error}; a JSON schema as an object is accepted")
            return None
        violations.unless(isinstance(schema, dict), field, "is no JSON object; a JSON schema as an object is accepted")
        source = json.dumps(_compact(schema), ensure_ascii=False)
    return Grammar(kind, source)


def _compact(schema: Any) -> Any:
    """`schema` for compact JSON, unless it says itself what white space there may be."""
    if not isinstance(schema, dict):
        return schema
    options = schema.get("x-guidance", {})
    if not isinstance(options, dict) or WHITESPACE_KEYS & options.keys():
        return schema
    return schema | {"x-guidance": COMPACT_JSON | options}
