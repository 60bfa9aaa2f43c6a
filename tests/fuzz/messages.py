"""Requests of every method: valid ones, made from what their fields mean, mutated field by field or byte by byte."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.fuzz.mutations import NUMBERS, TEXTS, mutated_bytes, mutated_json

from graftwork_server.front.rpc.server import SERVICES

Field = descriptor.FieldDescriptor
STANDARD = (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
MOST_BYTES = 3 << 20
"""Of one message: what is over the server's 4 MiB never gets to it."""

NAMES = {
    "Adapter": "adapters/good",
    "Version": "adapters/good",
    "Dataset": "datasets/{dataset}",
    "Strategy": "strategies/lora",
}
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
TOOLS = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])
ROWS = b'{"prompt": "the quick", "completion": " fox"}\n' * 4
VALUES: dict[str, list[Any]] = {
    "model": ["base", "good", "good@1"],
    "text": ["the quick brown fox", "x"],
    "text_pair": ["", "a pair"],
    "content": ["hello", "the fox"],
    "role": ["user", "assistant", "system"],
    "max_tokens": [1, 2, 3],
    "ids": [1, 5, 20, 45],
    "temperature": [0.0, 0.7],
    "top_p": [0.9, 1.0],
    "typical_p": [0.9, 1.0],
    "min_p": [0.0, 0.1],
    "top_k": [0, 5],
    "n": [1, 2],
    "best_of": [2, 3],
    "repetition_penalty": [1.0, 1.2],
    "stop": ["fox"],
    "bad_words": ["dog"],
    "stop_token_ids": [9],
    "json_schema": [SCHEMA],
    "regex": ["[ab]{1,3}"],
    "texts": ["yes", "no"],
    "lark": ['start: "a" | "b"'],
    "tools_json": ["", "", TOOLS],
    "tool_calls_json": ["", "", '[{"function": {"name": "f", "arguments": {}}}]'],
    "adapter_id": ["fuzzed"],
    "strategy": ["lora", ""],
    "strategy_id": ["lora"],
    "parent": ["adapters/good"],
    "page_size": [0, 1, 10],
    "page_token": [""],
    "request_id": ["", "", "once"],
    "cache_salt": ["", "salt"],
    "dimensions": [4],
    "dataset": ["datasets/{dataset}", "datasets/none"],
    "validation_dataset": [""],
    "validation_fraction": [0.0, 0.25],
    "display_name": ["rows"],
    "data": [ROWS],
    "sha256": [""],
    "size_bytes": [0, len(ROWS)],
    "service": ["", "graftwork.v1.GenerationService"],
    "file_containing_symbol": ["graftwork.v1.GenerationService.Chat"],
    "file_by_filename": ["graftwork/v1/generation.proto"],
}
SELDOM = {"prompt_logprobs", "best_of", "n", "echo", "structured_output", "logit_bias", "min_tokens", "priority"}
"""Fields that are seldom set: few requests have them all."""


@dataclass(frozen=True)
class Case:
    """One call: what is sent, and how it is left."""

    method: str
    streams_requests: bool
    streams_responses: bool
    messages: tuple[bytes, ...]
    cancel_after: int | None = None
    """Cancelled after so many messages were sent."""


def methods() -> list[descriptor.MethodDescriptor]:
    """Every method that the server has, health and reflection included."""
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(name) for name in SERVICES]
    services += [service for file in STANDARD for service in file.services_by_name.values()]
    return [method for service in services for method in service.methods]


METHODS = methods()


def case_of(seed: int, index: int, dataset: str) -> Case:
    """The case with this number, the same for the same seed."""
    choose = random.Random(f"{seed}:messages:{index}")
    method = METHODS[index % len(METHODS)]
    messages = _requests(method, choose, dataset)
    if method.client_streaming and choose.random() < 0.4:
        messages = _disordered(messages, choose)
    cancelled = choose.randrange(len(messages) + 1) if method.client_streaming and choose.random() < 0.15 else None
    path = f"/{method.containing_service.full_name}/{method.name}"
    return Case(path, method.client_streaming, method.server_streaming, tuple(messages), cancelled)


def _requests(method: descriptor.MethodDescriptor, choose: random.Random, dataset: str) -> list[bytes]:
    kind = choose.random()
    if kind < 0.05:
        return [choose.randbytes(choose.choice((0, 1, 5, 100, 5000)))]
    payloads = [None]
    if method.client_streaming:
        oneof = method.input_type.oneofs_by_name.get("payload")
        first = [field.name for field in oneof.fields] if oneof else []
        payloads = [first[0], *[first[-1]] * choose.choice((0, 1, 2))] if first else [None]
    result = []
    spoiled = choose.randrange(len(payloads))
    for position, payload in enumerate(payloads):
        message = _valid(method.input_type, choose, dataset, payload)
        if position == spoiled and kind > 0.25:
            for _ in range(choose.choice((1, 1, 2, 4))):
                _mutate(message, choose)
        data = message.SerializeToString()
        if position == spoiled and kind > 0.75:
            data = mutated_bytes(data, choose)
        result.append(data[:MOST_BYTES])
    return result


def _disordered(messages: list[bytes], choose: random.Random) -> list[bytes]:
    match choose.randrange(4):
        case 0:
            return messages[: choose.randrange(len(messages) + 1)]
        case 1:
            return messages[::-1]
        case 2:
            return messages * 2
    return [*choose.sample(messages, len(messages)), choose.randbytes(20)]


def _valid(
    kind: descriptor.Descriptor, choose: random.Random, dataset: str, payload: str | None = None, depth: int = 0
) -> Message:
    """A message that the server would take, or nearly so."""
    message: Any = message_factory.GetMessageClass(kind)()
    if kind.full_name == "google.protobuf.Struct":
        message.update({"max_steps": 1, "r": 2} if choose.random() < 0.3 else {"max_steps": -1})
        return message
    chosen = {oneof.name: choose.choice(oneof.fields).name for oneof in kind.oneofs}
    if payload is not None:
        chosen["payload"] = payload
    for field in kind.fields:
        oneof = field.containing_oneof
        synthetic = oneof is not None and len(oneof.fields) == 1
        if oneof is not None and not synthetic and chosen[oneof.name] != field.name:
            continue
        if payload is None and choose.random() < (0.9 if field.name in SELDOM else 0.6 if synthetic else 0.15):
            continue
        if depth < 6:
            _fill(message, field, choose, dataset, depth)
    return message


def _fill(message: Any, field: Field, choose: random.Random, dataset: str, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        if field.message_type.full_name.endswith("LogitBiasEntry"):
            getattr(message, field.name)[choose.randrange(100)] = 1.0
        return
    if field.message_type is not None:
        if field.is_repeated:
            for _ in range(choose.choice((1, 1, 2))):
                getattr(message, field.name).add().CopyFrom(
                    _valid(field.message_type, choose, dataset, depth=depth + 1)
                )
        else:
            getattr(message, field.name).CopyFrom(_valid(field.message_type, choose, dataset, depth=depth + 1))
        return
    values = VALUES.get(field.name)
    if field.name == "name":
        what = next((name for kind, name in NAMES.items() if kind in field.containing_type.name), "good")
        # What is deleted is never what other cases need.
        values = [what] if "Delete" not in field.containing_type.name else ["adapters/gone", "datasets/gone"]
    if values is None:
        return
    values = [v.format(dataset=dataset) if isinstance(v, str) and "{dataset}" in v else v for v in values]
    if field.is_repeated:
        getattr(message, field.name).extend(choose.choices(values, k=choose.choice((1, 2, 5))))
    else:
        setattr(message, field.name, choose.choice(values))


# ---------------------------------------------------------------------------------------------- mutations


def _mutate(message: Any, choose: random.Random) -> None:
    """Changes one field somewhere in `message`."""
    kind = message.DESCRIPTOR
    if kind.full_name == "google.protobuf.Struct":
        _spoil_struct(message, choose)
        return
    if not kind.fields:
        return
    present = [field for field, _ in message.ListFields()]
    field = choose.choice(present if present and choose.random() < 0.7 else kind.fields)
    if field.message_type is not None and not field.message_type.GetOptions().map_entry and choose.random() < 0.75:
        if field.is_repeated:
            entries = getattr(message, field.name)
            _mutate(choose.choice(entries) if entries else entries.add(), choose)
        else:
            inner = getattr(message, field.name)
            inner.SetInParent()
            _mutate(inner, choose)
        return
    _spoil(message, field, choose)


def _spoil(message: Any, field: Field, choose: random.Random) -> None:
    if choose.random() < 0.15:
        message.ClearField(field.name)
        return
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for _ in range(choose.choice((1, 3, 2000))):
            getattr(message, field.name)[choose.randrange(2**32)] = choose.choice((math.nan, 1e30, -1.0, 0.0))
        return
    if field.message_type is not None:
        if field.is_repeated:
            entries = getattr(message, field.name)
            for _ in range(choose.choice((1, 3, 300))):
                entries.add().CopyFrom(entries[0]) if len(entries) else entries.add()
        else:
            getattr(message, field.name).SetInParent()
        return
    if field.is_repeated:
        count = choose.choice((0, 1, 3, 300, 20_000 if field.type != Field.TYPE_STRING else 300))
        values = [_scalar(field, choose) for _ in range(min(count, 8))]
        message.ClearField(field.name)
        getattr(message, field.name).extend((values * (count // 8 + 1))[:count] if values else [])
    else:
        setattr(message, field.name, _scalar(field, choose))


def _scalar(field: Field, choose: random.Random) -> Any:
    match field.cpp_type:
        case Field.CPPTYPE_STRING if field.type == Field.TYPE_BYTES:
            return choose.choice((b"", b"\x00", b"\xff" * 100, ROWS, choose.randbytes(1000), b"{" * 100_000))
        case Field.CPPTYPE_STRING:
            return choose.choice(TEXTS)
        case Field.CPPTYPE_BOOL:
            return choose.random() < 0.5
        case Field.CPPTYPE_DOUBLE:
            return float(choose.choice(NUMBERS))
        case Field.CPPTYPE_FLOAT:
            return choose.choice((math.nan, math.inf, -math.inf, 0.0, -1.0, 3e38, 1e-45, 0.5))
        case Field.CPPTYPE_ENUM:
            return choose.choice((0, 1, 2, 3, 99, -1, 2**31 - 1))
    bits = 64 if field.cpp_type in (Field.CPPTYPE_INT64, Field.CPPTYPE_UINT64) else 32
    signed = field.cpp_type in (Field.CPPTYPE_INT32, Field.CPPTYPE_INT64)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return choose.choice((low, high, 0, 1, max(low, -1), 2, 33, 1000, choose.randint(low, high)))


def _spoil_struct(message: Any, choose: random.Random) -> None:
    settings = {
        "max_steps": 1,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 2},
        "learning_rate": 1e-3,
        "seed": 1,
        "batch_size": 2,
    }
    changed = mutated_json(settings, choose)
    for key, value in changed.items() if isinstance(changed, dict) else ():
        try:
            message.update({key: value})
        except (ValueError, TypeError, OverflowError, UnicodeError):  # what JSON can hold and protobuf cannot
            message.fields[key if key.isascii() else "key"].null_value = 0
