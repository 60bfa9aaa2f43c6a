"""Adapters, checkpoints, tokenizers, templates and data sets with something wrong in them, as uploads."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import toys
from tests.fuzz.mutations import TEMPLATES, TEXTS, any_value, mutated_bytes, mutated_json, written

BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1,
    "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
"""Of one value of each type that a safetensors file may name."""
DTYPES = tuple(BYTES)
ROWS: list[Any] = [
    {"text": "the quick brown fox"},
    {"prompt": "the quick", "completion": " fox"},
    {"instruction": "say", "input": "it", "output": "yes"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@dataclass(frozen=True)
class FileCase:
    """What one upload holds: an adapter's files, or rows.jsonl, a data set."""

    kind: str
    files: dict[str, bytes]
    stores: bool = False
    """A data set that is stored, and not only validated."""


class Originals:
    """Sound files, from which the others are made."""

    def __init__(self, model: Path, scratch: Path) -> None:
        lora = toys.make_adapter(model, scratch / "lora", r=4)
        self.tokenizer = {name: (model / name).read_bytes() for name in _TOKENIZER_FILES}
        self.adapters = {
            "lora": _read(lora),
            "dora": _read(toys.make_adapter(model, scratch / "dora", r=2, use_dora=True)),
            "patterns": _with_config(_read(lora), rank_pattern={r".*q_proj$": 4}, target_modules=r".*_proj"),
            "checkpoint": _read(toys.make_checkpoint(model, scratch / "checkpoint")),
        }
        others = toys.other_peft_configs("llama")
        self.adapters |= {name: _read(path) for name, path in toys.make_all(model, scratch / "others", others).items()}

    def case(self, seed: int, index: int) -> FileCase:
        """The case with this number, the same for the same seed."""
        choose = random.Random(f"{seed}:files:{index}")
        match index % 5:
            case 0:
                return self._weights(choose)
            case 1:
                return self._config(choose)
            case 2:
                return self._tokenizer(choose)
            case 3:
                return self._template(choose)
        return FileCase("data set", {"rows.jsonl": _rows(choose)}, stores=choose.random() < 0.5)

    def _weights(self, choose: random.Random) -> FileCase:
        files = dict(self.adapters[choose.choice(sorted(self.adapters))])
        name = choose.choice([name for name in files if name.endswith(".safetensors")])
        files[name] = _mutated_safetensors(files[name], choose)
        return FileCase("safetensors", files)

    def _config(self, choose: random.Random) -> FileCase:
        files = dict(self.adapters[choose.choice(sorted(self.adapters))])
        name = choose.choice([name for name in files if name.endswith("config.json")])
        files[name] = _mutated_document(files[name], choose)
        return FileCase("config", files)

    def _tokenizer(self, choose: random.Random) -> FileCase:
        files = self.adapters["lora"] | self.tokenizer
        name = choose.choice(_TOKENIZER_FILES)
        files[name] = _mutated_document(files[name], choose)
        return FileCase("tokenizer", files)

    def _template(self, choose: random.Random) -> FileCase:
        files = self.adapters["lora"] | self.tokenizer
        template = choose.choice([*TEMPLATES, _TEMPLATE])
        if choose.random() < 0.5:
            template = mutated_bytes(template.encode(), choose).decode("utf-8", "replace")
        if choose.random() < 0.5:
            files["chat_template.jinja"] = template.encode("utf-8", "replace")
        else:
            config = json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
            files["tokenizer_config.json"] = json.dumps(config).encode()
        return FileCase("template", files)


def _read(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors")
    }


def _with_config(files: dict[str, bytes], **values: Any) -> dict[str, bytes]:
    config = json.loads(files["adapter_config.json"]) | values
    return files | {"adapter_config.json": json.dumps(config).encode()}


def _mutated_document(data: bytes, choose: random.Random) -> bytes:
    if choose.random() < 0.2:
        return mutated_bytes(data, choose)
    return written(mutated_json(json.loads(data), choose), choose)


def _mutated_safetensors(data: bytes, choose: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match choose.randrange(6):
        case 0:
            return mutated_bytes(data[: 8 + length], choose) + body
        case 1:  # values
            at = choose.randrange(max(len(body) - 8, 1))
            return (
                data[:8] + header + body[:at] + choose.choice((b"\xff" * 8, b"\x00\x00\xc0\x7f" * 2)) + body[at + 8 :]
            )
        case 2:
            return choose.choice((0, 1, length + 1, 2**63, 2**64 - 1)).to_bytes(8, "little") + header + body
        case 3:
            return data[: choose.randrange(len(data))]
        case 4:  # other types, with as many bytes as they take
            return _retyped(json.loads(header), choose)
    text = written(mutated_json(json.loads(header), choose), choose)
    return len(text).to_bytes(8, "little") + text + body


def _retyped(header: dict[str, Any], choose: random.Random) -> bytes:
    dtype, share = choose.choice(DTYPES), choose.choice((0.1, 1.0))
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if choose.random() < share:
            entry["dtype"] = dtype
        if choose.random() < 0.02:
            entry["shape"] = choose.choice(([], [0], [1] * 10, entry["shape"][::-1]))
        size = BYTES[entry["dtype"]]
        for extent in entry["shape"]:
            size *= extent
        entry["data_offsets"], end = [end, end + size], end + size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + choose.choice((b"\x38", b"\x00", b"\x01")) * end


def _rows(choose: random.Random) -> bytes:
    rows = [choose.choice(ROWS)] * choose.choice((1, 3, 8))
    if choose.random() < 0.5:
        rows = [dict(row) for row in choose.choices(ROWS, k=5)]
    lines = [json.dumps(row).encode() for row in rows]
    spoiled = choose.randrange(len(lines))
    lines[spoiled] = written(mutated_json(rows[spoiled], choose), choose)
    if choose.random() < 0.2:
        lines.append(json.dumps({"text": choose.choice(TEXTS) or "x", "more": str(any_value(choose))[:100]}).encode())
    data = b"\n".join(lines)
    return mutated_bytes(data, choose) if choose.random() < 0.3 else data
