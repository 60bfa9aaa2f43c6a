"""What a hostile or broken client may send to the generation service: the server names what is wrong, takes no memory
for it, and goes on answering others."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.e2e.reference import PROMPT
from tests.e2e.serving import START_SECONDS, Server, eventually

from graftwork import AsyncClient, Client, InvalidArgumentError, NotFoundError
from graftwork.v1 import generation_pb2 as pb

MEBIBYTE = 1 << 20
SERVICE = "/graftwork.v1.GenerationService"
LARGEST = 2**31 - 1

HOSTILE: dict[str, list[Any]] = {
    "max_tokens": [0, -1, LARGEST],
    "min_tokens": [-1, -LARGEST],
    "temperature": [-1.0, 1e30, math.inf, math.nan],
    "top_k": [-1],
    "top_p": [0.0, -1.0, 1.5, math.inf, math.nan],
    "min_p": [-0.5, 2.0, math.nan],
    "typical_p": [0.0, 2.0, math.nan],
    "repetition_penalty": [0.0, -1.0, math.inf, math.nan],
    "presence_penalty": [1e9, -math.inf, math.nan],
    "frequency_penalty": [1e9, math.inf, math.nan],
    "logprobs": [-1, 21, LARGEST],
    "prompt_logprobs": [-1, 21, LARGEST],
    "n": [0, -1, 33, LARGEST],
    "best_of": [-1, 33, LARGEST],
    "stop": [["x"] * 100_000, [""], ["x" * 100_000]],
    "stop_token_ids": [[7] * 100_000, [LARGEST]],
    "bad_words": [["x"] * 100_000, [""], ["x" * 100_000]],
    "logit_bias": [dict.fromkeys(range(100_000), 1.0), {LARGEST: 1.0}, {1: math.nan}, {1: math.inf}],
}
"""By field of SamplingParameters: values that must be refused, whatever the others are."""


def memory(server: Server) -> int:
    """Resident bytes of the server's processes."""
    return sum(process.memory_info().rss for process in [psutil.Process(server.process.pid), *server.descendants()])


def refusal(error: grpc.RpcError) -> tuple[grpc.StatusCode, set[str]]:
    """The status code, and the fields that are named."""
    fields: set[str] = set()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                violations = error_details_pb2.BadRequest()
                if detail.Unpack(violations):
                    fields |= {violation.field for violation in violations.field_violations}
    return error.code(), fields


@st.composite
def hostile_parameters(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.sets(st.sampled_from(sorted(HOSTILE)), min_size=1, max_size=6))
    return {name: draw(st.sampled_from(HOSTILE[name])) for name in sorted(names)}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile_parameters())
def test_parameters_of_any_size_are_named_and_take_no_memory(server: Server, values: dict[str, Any]) -> None:
    before = memory(server)
    parameters = pb.SamplingParameters(**values)
    request = pb.GenerateRequest(model="base", token_ids=pb.TokenIds(ids=PROMPT), sampling=parameters)
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_stream(
            f"{SERVICE}/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request, timeout=START_SECONDS))
    code, fields = refusal(caught.value)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    named = {field.removeprefix("sampling.").split("[")[0] for field in fields}
    assert named == set(values), "each wrong field, and no other"
    assert memory(server) - before < 64 * MEBIBYTE


def mutated(data: bytes, choose: random.Random) -> bytes:
    """`data` with one to six bytes changed, put in or taken out."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 6)):
        at, what = choose.randrange(len(changed)), choose.randrange(3)
        if what == 0:
            changed[at] = choose.randrange(256)
        elif what == 1:
            changed.insert(at, choose.randrange(256))
        elif len(changed) > 1:
            del changed[at]
    return bytes(changed)


def test_bytes_that_are_no_request_are_invalid(server: Server, client: Client) -> None:
    """Valid requests with bytes changed, taken out and put in: some remain valid, none is a defect of the server."""
    requests: dict[str, bytes] = {
        "Generate": pb.GenerateRequest(
            model="base", text="quick", sampling=pb.SamplingParameters(max_tokens=3, temperature=0.5)
        ).SerializeToString(),
        "Score": pb.ScoreRequest(model="base", token_ids=pb.TokenIds(ids=PROMPT)).SerializeToString(),
        "Chat": pb.ChatRequest(
            model="base",
            messages=[pb.ChatMessage(role="user", content="x")],
            sampling=pb.SamplingParameters(max_tokens=3),
        ).SerializeToString(),
    }
    choose = random.Random(5)
    written = server.log.stat().st_size
    codes: dict[grpc.StatusCode, int] = {}
    with grpc.insecure_channel(server.address) as channel:
        for number in range(600):
            method = choose.choice(sorted(requests))
            data = mutated(requests[method], choose)
            kind = channel.unary_unary if method == "Score" else channel.unary_stream
            call = kind(f"{SERVICE}/{method}", request_serializer=bytes, response_deserializer=bytes)
            code = grpc.StatusCode.OK
            try:
                answer = call(data, timeout=20)
                if method != "Score":
                    list(answer)
            except grpc.RpcError as error:
                code = error.code()
            codes[code] = codes.get(code, 0) + 1
            assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), (number, method, data)
    assert codes.get(grpc.StatusCode.INVALID_ARGUMENT, 0) > 100, codes
    assert b"Traceback" not in server.log.read_bytes()[written:]
    assert client.generate("base", PROMPT, max_tokens=1).token_ids


async def test_unknown_names_under_load_are_not_found_and_nobody_notices(server: Server, client: Client) -> None:
    expected = client.generate("base", PROMPT, max_tokens=200, ignore_eos=True).token_ids
    async with AsyncClient(address=server.address, timeout=START_SECONDS, max_retries=0) as connected:
        streams = [connected.generate("base", PROMPT, max_tokens=200, ignore_eos=True) for _ in range(8)]
        strangers = [
            connected.generate(f"nobody-{number}", PROMPT, max_tokens=5)
            if number % 2
            else connected.score("base@7x", PROMPT)
            for number in range(300)
        ]
        answers = await asyncio.gather(*streams, *strangers, return_exceptions=True)
    assert all(answer.token_ids == expected for answer in answers[:8])  # type: ignore[union-attr]
    unknown = [answer for answer in answers[8:] if isinstance(answer, NotFoundError)]
    assert len(unknown) == 150
    assert {error.reason for error in unknown} == {"ADAPTER_NOT_FOUND"}
    assert all(isinstance(answer, Exception) for answer in answers[8:])


BOMBS = [
    {"regex": "(abcdefghijklmnopqrstuvwxyz){60000}"},
    {"regex": "[a-z]{20}(abcdefghijklmnopqrstuvwxyz){60000}"},
    {"regex": "(a|b|[c-z]{0,9})" * 500},
    {"lark": "start: " + "|".join(f"T{i}" for i in range(900)) + "".join(f"\nT{i}: /[a-z]+{i}/" for i in range(900))},
]


def test_a_bomb_does_not_stop_its_neighbours(server: Server, client: Client) -> None:
    """A stream goes on while grammars that take long are compiled, whether they are accepted or not."""
    tokens = 0
    done = threading.Event()

    def stream() -> None:
        nonlocal tokens
        with client.generate("base", PROMPT, max_tokens=900_000, ignore_eos=True, stream=True) as chunks:
            for chunk in chunks:
                tokens += len(chunk.token_ids)
                if done.is_set():
                    return

    with server.client() as connected, ThreadPoolExecutor(1) as threads:
        neighbour = threads.submit(stream)
        eventually(lambda: tokens > 10, "the stream")
        during = [0] * len(BOMBS)
        for number, bomb in enumerate(BOMBS):
            for _ in range(50):  # some are refused within milliseconds
                before = tokens
                with contextlib.suppress(InvalidArgumentError):
                    connected.generate("base", PROMPT, max_tokens=1, **bomb)
                during[number] += tokens - before
                if during[number] >= 5:
                    break
        done.set()
        neighbour.result(START_SECONDS)
    assert min(during) >= 5, during


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
# :method POST, :scheme http (indexed), :path and :authority as literals without indexing, content-type, te.
HEADERS = (
    b"\x83\x86"
    + b"\x04"
    + bytes([len(f"{SERVICE}/Generate")])
    + f"{SERVICE}/Generate".encode()
    + b"\x01\x09localhost"
    + b"\x0f\x10\x10application/grpc"
    + b"\x00\x02te\x08trailers"
)
ABUSE = {
    "no HTTP/2 at all": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 200,
    "noise": random.Random(1).randbytes(100_000),
    "pings": PREFACE + frame(6, 0, 0, b"12345678") * 20_000,
    "settings": PREFACE + frame(4, 0, 0, struct.pack("!HI", 4, 65535)) * 20_000,
    "empty data": PREFACE + frame(1, 4, 1, HEADERS) + frame(0, 0, 1) * 20_000,
    "rapid resets": PREFACE
    + b"".join(frame(1, 4, 2 * i + 1, HEADERS) + frame(3, 0, 2 * i + 1, struct.pack("!I", 8)) for i in range(5_000)),
    "headers that never end": PREFACE + frame(1, 0, 1, HEADERS) + frame(9, 0, 1, b"\x00\x01a\x7f" + b"b" * 200) * 2_000,
    "a message longer than it says it may be": PREFACE
    + frame(1, 4, 1, HEADERS)
    + frame(0, 0, 1, b"\x00\xff\xff\xff\xff" + b"x" * 16_000),
}


@pytest.mark.parametrize("kind", ABUSE)
def test_abuse_of_http2_ends_its_own_connection_at_most(server: Server, client: Client, kind: str) -> None:
    before = memory(server)
    connections = [socket.create_connection(server.address.rsplit(":", 1), timeout=20) for _ in range(3)]
    try:
        for connection in connections:
            connection.settimeout(5)
            try:
                connection.sendall(ABUSE[kind])
                while connection.recv(1 << 16):
                    pass
            except OSError:
                pass  # closed by the server, or left open with nothing to say
        assert client.generate("base", PROMPT, max_tokens=3).token_ids
    finally:
        for connection in connections:
            connection.close()
    assert client.generate("base", PROMPT, max_tokens=3).token_ids
    assert memory(server) - before < 128 * MEBIBYTE


async def test_cancels_at_random_tokens_leave_nothing(server: Server, client: Client) -> None:
    """Streams are left after any number of tokens; then as many as there are places are answered, and as before."""
    expected = client.generate("base", PROMPT, max_tokens=40, ignore_eos=True).token_ids
    choose = random.Random(3)
    async with AsyncClient(address=server.address, timeout=START_SECONDS, max_retries=0) as connected:

        async def leave(after: int) -> None:
            stream = await connected.generate(
                "base", PROMPT, max_tokens=100_000, ignore_eos=True, n=choose.choice((1, 1, 3)), stream=True
            )
            async with stream:
                seen = 0
                async for chunk in stream:
                    seen += len(chunk.token_ids)
                    if seen >= after:
                        break

        for _ in range(10):
            await asyncio.gather(*(leave(choose.randint(0, 60)) for _ in range(32)))
        answers = await asyncio.gather(
            *(connected.generate("base", PROMPT, max_tokens=40, ignore_eos=True) for _ in range(32))
        )
    assert all(answer.token_ids == expected for answer in answers)
