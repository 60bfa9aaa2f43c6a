"""Text that cannot be encoded or shown, patterns and tensors of every kind: a refusal by name, for its sender alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file
from tests import toys
from tests.e2e.serving import START_SECONDS, Server

from graftwork import APIError, Client
from graftwork.v1 import adapters_pb2 as pb
from graftwork.v1 import generation_pb2, tuning_pb2
from graftwork.v1.adapters_pb2_grpc import AdapterServiceStub
from graftwork.v1.generation_pb2_grpc import GenerationServiceStub
from graftwork.v1.tuning_pb2_grpc import TuningServiceStub

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = [1, 20, 45, 77]
REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


@pytest.fixture(autouse=True)
def _nothing_else_is_touched(server: Server, client: Client) -> Iterator[None]:
    """The same front and engine as before, the same answer, and no traceback."""
    engine, written = server.engine(), server.log.stat().st_size
    before = client.generate("base", PROMPT, max_tokens=4, ignore_eos=True).token_ids
    yield
    assert client.generate("base", PROMPT, max_tokens=4, ignore_eos=True).token_ids == before
    after = server.engine()
    assert engine is not None
    assert after is not None
    assert engine.pid == after.pid
    log = server.log.read_bytes()[written:]
    assert b"Traceback" not in log
    assert b"never retrieved" not in log


@pytest.fixture(scope="module")
def sound(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.make_adapter(model_dir, tmp_path_factory.mktemp("sound") / "adapter", r=4)


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as connected:
        yield connected


def upload(channel: grpc.Channel, files: dict[str, bytes], strategy: str = "lora") -> str:
    """The message of the refusal, which has a reason; "" if the files were taken."""
    infos = [pb.FileInfo(name=name, size_bytes=len(data)) for name, data in files.items()]
    about = pb.AdapterUpload(adapter_id="strange", files=infos, load=True, new_version=True, strategy=strategy)
    messages = [pb.CreateAdapterRequest(upload=about)]
    for name, data in files.items():
        for begin in range(0, len(data), 1 << 20):
            chunk = pb.FileChunk(name=name, data=data[begin : begin + (1 << 20)])
            messages.append(pb.CreateAdapterRequest(chunk=chunk))
    refused = None
    try:
        AdapterServiceStub(channel).CreateAdapter(iter(messages), timeout=START_SECONDS)
    except grpc.RpcError as error:
        refused = error
    if refused is None:
        return ""
    assert refused.code() in REFUSED, refused
    assert reason(refused)
    details = refused.details()
    assert details is not None
    assert details.isprintable()
    return details


def reason(error: grpc.RpcError) -> str:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info.reason
    return ""


DOCUMENTS: dict[str, str | bytes] = {
    "a key": r'{"peft_type": "LORA", "\ud800": 1}',
    "a value": r'{"peft_type": "LORA", "target_modules": "\ud800"}',
    "a type": r'{"peft_type": "\ud800"}',
    "a name in a list": r'{"peft_type": "LORA", "target_modules": ["q_proj", "\ud800"]}',
    "a key of a pattern": r'{"peft_type": "LORA", "rank_pattern": {"\ud800": 4}}',
    "deep inside": r'{"peft_type": "LORA", "auto_mapping": {"parent_library": {"x": ["\ud800"]}}}',
    "raw bytes": b'{"peft_type": "LORA", "\xed\xa0\x80": 1}',
    "nested": '{"peft_type": "LORA", "x": ' + "[" * 900 + "]" * 900 + "}",
    "NUL": '{"peft_type": "LORA", "a\\u0000b": 1}',
    "a line end": '{"peft_type": "LORA", "a\\nERROR b": 1}',
    "a mark of direction": '{"peft_type": "LORA", "\u202ea": 1}',
    "a number that no float holds": '{"peft_type": "LORA", "r": ' + "9" * 400 + "}",
    "such a number in a pattern": '{"peft_type": "LORA", "rank_pattern": {"q_proj": ' + "9" * 400 + "}}",
    "such a number deep inside": '{"peft_type": "LORA", "auto_mapping": {"x": [' + "9" * 400 + "]}}",
    "a long key": '{"peft_type": "LORA", "' + "x" * 3_000_000 + '": 1}',
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_strange_text_in_a_configuration(channel: grpc.Channel, sound: Path, kind: str) -> None:
    document = DOCUMENTS[kind]
    data = document if isinstance(document, bytes) else document.encode()
    for strategy in ("lora", "ia3", ""):
        assert upload(channel, {CONFIG: data, WEIGHTS: (sound / WEIGHTS).read_bytes()}, strategy)


def with_config(sound: Path, **values: Any) -> dict[str, bytes]:
    config = json.loads((sound / CONFIG).read_text()) | values
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: (sound / WEIGHTS).read_bytes()}


@pytest.mark.parametrize("pattern", ["(?R)", "([a-z._0-9]+)+!", "(.*)*x", "(", "a{1,99999999999}", "\u202e("])
@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_patterns_of_strangers_are_bounded(channel: grpc.Channel, sound: Path, key: str, pattern: str) -> None:
    value: Any = {pattern: 4} if key in ("rank_pattern", "alpha_pattern") else pattern
    more = {"layers_to_transform": [0]} if key == "layers_pattern" else {}
    assert upload(channel, with_config(sound, **{key: value}, **more))


@pytest.mark.parametrize(
    "key",
    [
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
    ],
)
def test_names_without_number_are_refused(channel: grpc.Channel, sound: Path, key: str) -> None:
    """Each is compared with each module of the base."""
    names = [f"k{number}" for number in range(100_000)]
    value: Any = names
    if key in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
        value = {name: [1] if key == "trainable_token_indices" else 4 for name in names}
    assert "up to 4096" in upload(channel, with_config(sound, **{key: value}))


DTYPES = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2}
DTYPES |= {"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8, "F4": 1, "F128": 16}
COMPUTABLE = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0")


def of_dtype(sound: Path, dtype: str, names: str) -> bytes:
    """The adapter's file with all tensors whose name has `names` declared as `dtype`, all bytes 0x38."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in load_file(sound / WEIGHTS).items():
        kind = dtype if names in name else "F32"
        begin, end = end, end + tensor.numel() * DTYPES[kind]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\x38" * end


@pytest.mark.parametrize("names", ["", "lora_A", "layers.0.self_attn.q_proj.lora_B"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_data_type_is_taken_or_refused_by_name(
    channel: grpc.Channel, client: Client, sound: Path, dtype: str, names: str
) -> None:
    refusal = upload(channel, {CONFIG: (sound / CONFIG).read_bytes(), WEIGHTS: of_dtype(sound, dtype, names)})
    if dtype in COMPUTABLE:
        assert not refusal
        assert client.generate("strange", PROMPT, max_tokens=2).token_ids
    else:
        assert "floating point" in refusal or "data type" in refusal or "float32" in refusal, refusal


@pytest.mark.parametrize("schema", [r'{"const": "\ud800"}', r'{"\ud800": 1}', r'{"enum": ["a", "\ud800"]}'])
def test_a_schema_with_half_a_character(channel: grpc.Channel, schema: str) -> None:
    output = generation_pb2.StructuredOutput(json_schema=schema)
    request = generation_pb2.GenerateRequest(
        model="base", text="x", sampling=generation_pb2.SamplingParameters(structured_output=output)
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(GenerationServiceStub(channel).Generate(request, timeout=START_SECONDS))
    assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")


def test_a_data_set_with_half_a_character(channel: grpc.Channel) -> None:
    rows = [r'{"text": "\ud800"}', r'{"\ud800": "a"}', r'{"messages": [{"role": "\ud800", "content": "x"}]}']
    messages = [tuning_pb2.ValidateDatasetRequest(check=tuning_pb2.DatasetCheck())]
    messages.append(tuning_pb2.ValidateDatasetRequest(data="\n".join(rows).encode()))
    report = TuningServiceStub(channel).ValidateDataset(iter(messages), timeout=START_SECONDS)
    assert report.error_count == len(rows)


@pytest.mark.parametrize("method", ["Check", "Watch", "List"])
def test_bytes_that_are_no_message_of_health(channel: grpc.Channel, method: str) -> None:
    call = channel.unary_stream(f"/grpc.health.v1.Health/{method}", None, None)(b"\x0a\x05ab", timeout=START_SECONDS)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_INVALID")


def test_bytes_that_are_no_message_of_reflection(channel: grpc.Channel) -> None:
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    call = channel.stream_stream(path, None, None)(iter([b"\x3a\x00", b"\x0a\x05ab"]), timeout=START_SECONDS)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_INVALID")


def test_health_lists_every_service(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    statuses = stub.List(health_pb2.HealthListRequest(), timeout=START_SECONDS).statuses
    assert {"", "graftwork.v1.GenerationService", "graftwork.v1.TuningService"} <= set(statuses)
    assert {status.status for status in statuses.values()} == {health_pb2.HealthCheckResponse.SERVING}
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody\u202e"), timeout=START_SECONDS)
    assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.NOT_FOUND, "SERVICE_NOT_FOUND")


async def test_cancelled_uploads_leave_no_word_in_the_log(server: Server) -> None:
    """Each piece is wrong, and the client goes while it is being looked at."""
    info = pb.FileInfo(name=WEIGHTS, size_bytes=10)
    messages = [
        pb.CreateAdapterRequest(upload=pb.AdapterUpload(adapter_id="gone", files=[info])),
        pb.CreateAdapterRequest(chunk=pb.FileChunk(name="other", data=b"x" * 900_000)),
    ]

    async def leave(channel: grpc.aio.Channel, after: float) -> None:
        call = channel.stream_unary("/graftwork.v1.AdapterService/CreateAdapter")()
        try:
            for message in messages:
                await call.write(message.SerializeToString())
            await asyncio.sleep(after)
            call.cancel()
            await call
        except (asyncio.CancelledError, grpc.RpcError, asyncio.InvalidStateError):
            pass

    async with grpc.aio.insecure_channel(server.address) as channel:
        for number in range(10):
            await asyncio.gather(*(leave(channel, (number * 8 + other) / 20_000) for other in range(8)))


def test_the_client_shows_it(client: Client, tmp_path: Path, sound: Path) -> None:
    for name, data in with_config(sound, **{"x\u202e\ud800": 1}).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(APIError, match="ud800"):
        client.adapters.create("shown", tmp_path)
