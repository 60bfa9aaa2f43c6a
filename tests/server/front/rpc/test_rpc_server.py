"""What is around every call: request ids, error details, health, reflection, the drain, the address."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.server import scripted_engine as script

from graftwork.v1 import generation_pb2 as pb
from graftwork.v1 import strategies_pb2
from graftwork_server import logs
from graftwork_server.errors import InvalidArgument, Violation
from graftwork_server.front.rpc.interceptors import to_status
from graftwork_server.front.rpc.server import SERVICES, ListenError, resolve_listen


def hanging(server):
    return server.generation.Generate(
        pb.GenerateRequest(
            model="base",
            token_ids=pb.TokenIds(ids=[script.HANG, 97]),
            sampling=pb.SamplingParameters(max_tokens=100),
        )
    )


async def health_of(server, service="") -> str:
    stub = health_pb2_grpc.HealthStub(server.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


# ---------------------------------------------------------------------------------------------- request ids


async def test_a_request_id_comes_back_in_both_metadata(shared):
    call = shared.generation.Tokenize(pb.TokenizeRequest(text="a"), metadata=(("x-request-id", "mine-1"),))
    await call
    assert dict(await call.initial_metadata())["x-request-id"] == "mine-1"
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine-1"


async def test_a_request_id_comes_back_at_the_end_of_a_stream(shared):
    request = pb.GenerateRequest(model="base", text="a", sampling=pb.SamplingParameters(max_tokens=2))
    call = shared.generation.Generate(request, metadata=(("x-request-id", "mine-3"),))
    assert [message async for message in call]
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine-3"


@pytest.mark.parametrize("sent", [None, "", "with space", "x" * 200, "[31m"])
async def test_a_request_id_is_made_where_there_is_no_usable_one(shared, sent):
    metadata = (("x-request-id", sent),) if sent is not None else ()
    call = shared.generation.Tokenize(pb.TokenizeRequest(text="a"), metadata=metadata)
    await call
    made = dict(await call.trailing_metadata())["x-request-id"]
    assert made != sent
    assert len(made) == 16


async def test_an_error_carries_the_request_id(shared, refused):
    error = await refused(
        shared.generation.Generate(pb.GenerateRequest(model="base"), metadata=(("x-request-id", "mine-2"),))
    )
    assert error.trailers["x-request-id"] == "mine-2"


async def test_the_access_log_has_one_line_per_call(shared, caplog):
    with caplog.at_level(logging.INFO, "graftwork.access"):
        await shared.generation.Tokenize(pb.TokenizeRequest(text="a"))
    lines = [record.getMessage() for record in caplog.records if record.name == "graftwork.access"]
    assert lines == ["Tokenize OK"]


# ---------------------------------------------------------------------------------------------- errors


async def test_a_defect_is_internal_without_a_trace_of_the_server(shared, refused, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("secret /srv/path")

    monkeypatch.setattr("graftwork_server.front.rpc.generation.service.check_prompt", broken)
    error = await refused(shared.generation.Generate(pb.GenerateRequest(model="base", text="x")))
    assert (error.code, error.reason) == ("INTERNAL", "INTERNAL")
    assert "secret" not in error.message
    assert error.trailers["x-request-id"] in error.message
    assert "secret" in caplog.text


def test_a_hundred_violations_fit_the_trailers_of_any_client():
    violations = [Violation(f"line {n}", f"line {n} is not JSON: " + "ü" * 300) for n in range(1, 101)]
    status = to_status(InvalidArgument("m" * 5000, reason="BAD_LINES", violations=violations))
    assert len(status.SerializeToString()) * 4 / 3 + len(status.message) < 8000
    assert len(status.message) <= 600
    (bad,) = (d for d in map(_bad_request_of, status.details) if d is not None)
    *whole, last = bad.field_violations
    assert all(violation.description.endswith("ü") for violation in whole)
    assert last.description == f"{100 - len(whole)} more, which an answer has no room for"


def _bad_request_of(detail):
    bad = error_details_pb2.BadRequest()
    return bad if detail.Unpack(bad) else None


async def test_control_characters_do_not_break_the_message(shared, refused):
    error = await refused(shared.generation.Generate(pb.GenerateRequest(model="a\r\nb\0ü", text="x")))
    assert error.code == "INVALID_ARGUMENT"
    assert "\n" not in error.message


# ---------------------------------------------------------------------------------------------- health, reflection


async def test_health_tells_for_the_server_and_each_service(shared):
    for service in ("", *SERVICES):
        assert await health_of(shared, service) == "SERVING"
    with pytest.raises(grpc.aio.AioRpcError):
        await health_of(shared, "nobody")


async def test_health_follows_the_engine(make_server, refused):
    server = await make_server()
    stub = health_pb2_grpc.HealthStub(server.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))
    seen = [(await watch.read()).status]
    crash = pb.GenerateRequest(model="base", token_ids=pb.TokenIds(ids=[script.CRASH]))
    await refused(server.generation.Generate(crash))
    seen += [(await watch.read()).status, (await watch.read()).status]
    status = health_pb2.HealthCheckResponse
    assert seen == [status.SERVING, status.NOT_SERVING, status.SERVING]
    watch.cancel()


async def test_reflection_lists_and_describes_all_services(shared):
    stub = reflection_pb2_grpc.ServerReflectionStub(shared.channel)
    wanted = (*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    requests += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=service) for service in wanted]
    answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    assert {service.name for service in answers[0].list_services_response.service} == set(wanted)
    for answer in answers[1:]:
        assert answer.file_descriptor_response.file_descriptor_proto
    file = descriptor_pb2.FileDescriptorProto.FromString(answers[1].file_descriptor_response.file_descriptor_proto[0])
    assert file.package == "graftwork.v1"


# ---------------------------------------------------------------------------------------------- drain


async def test_a_drain_refuses_new_calls_and_lets_running_ones_finish(make_server, refused):
    server = await make_server(options={"step_ms": 10})
    running = server.generation.Generate(
        pb.GenerateRequest(model="base", text="a", sampling=pb.SamplingParameters(max_tokens=20))
    )
    first = await running.read()
    drain = asyncio.create_task(server.front.drain())
    await asyncio.sleep(0.05)
    assert await health_of(server) == "NOT_SERVING"
    error = await refused(server.generation.Tokenize(pb.TokenizeRequest(text="a")))
    assert (error.code, error.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
    assert error.retry_ms > 0
    rest = []
    while (message := await running.read()) is not grpc.aio.EOF:
        rest.append(message)
    assert first.text + "".join(m.text for m in rest) == "bcdefghijklmnopqrstu"
    assert rest[-1].finish_reason == pb.FINISH_REASON_LENGTH
    await asyncio.wait_for(drain, 5)


async def test_a_stream_that_a_drain_breaks_off_does_not_look_like_success(make_server, refused):
    server = await make_server(drain_seconds=0.1)
    call = hanging(server)
    await call.read()
    drain = asyncio.create_task(server.front.drain())
    error = await refused(call)
    assert (error.code, error.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
    await asyncio.wait_for(drain, 5)


# ---------------------------------------------------------------------------------------------- address, limits


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1"])
def test_loopback_addresses_are_served(listen):
    assert resolve_listen(listen, insecure=False).endswith(":1")


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "192.0.2.7:1", "0:1", "other.test:1"])
def test_other_addresses_need_insecure(listen, monkeypatch):
    real = socket.getaddrinfo
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.8", 1))]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: answer if host == "other.test" else real(host, *a, **k)
    )
    with pytest.raises(ListenError, match="--insecure"):
        resolve_listen(listen, insecure=False)
    assert resolve_listen(listen, insecure=True)


def test_an_unknown_host_is_said(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "no")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ListenError, match="not known"):
        resolve_listen("nowhere.invalid:1", insecure=True)


async def test_a_message_that_is_too_large_is_refused(shared):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await shared.generation.Tokenize(pb.TokenizeRequest(text="a" * (5 << 20)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await shared.generation.Tokenize(pb.TokenizeRequest(text="a" * 100_000))


# ---------------------------------------------------------------------------------------------- strategies


async def test_strategies_are_listed_a_page_at_a_time(shared, refused):
    first = await shared.strategies.ListStrategies(strategies_pb2.ListStrategiesRequest(page_size=2))
    assert [s.strategy_id for s in first.strategies] == ["broken", "full"]
    assert "no module" in first.strategies[0].load_error
    second = await shared.strategies.ListStrategies(
        strategies_pb2.ListStrategiesRequest(page_size=2, page_token=first.next_page_token)
    )
    assert [s.strategy_id for s in second.strategies] == ["lora"]
    assert second.next_page_token == ""
    for wrong in ({"page_size": -1}, {"page_size": 1001}, {"page_token": "!!"}, {"page_token": "é"}):
        error = await refused(shared.strategies.ListStrategies(strategies_pb2.ListStrategiesRequest(**wrong)))
        assert next(iter(wrong)) in error.fields


async def test_one_strategy(shared, refused):
    answer = await shared.strategies.GetStrategy(strategies_pb2.GetStrategyRequest(name="strategies/lora"))
    assert json.loads(answer.strategy.config_json_schema) == {"type": "object"}
    error = await refused(shared.strategies.GetStrategy(strategies_pb2.GetStrategyRequest(name="strategies/nope")))
    assert (error.code, error.reason) == ("NOT_FOUND", "STRATEGY_NOT_FOUND")


# ---------------------------------------------------------------------------------------------- logs


@pytest.mark.parametrize("format", ["text", "json"])
def test_log_lines_carry_the_request_id(format, capsys):
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    token = logs.request_id.set("r-1")
    try:
        logs.set_up("info", format)
        logging.getLogger("graftwork.test").info("something %s", "happened")
    finally:
        logs.request_id.reset(token)
        root.handlers[:] = before
        root.setLevel(level)
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    if format == "json":
        entry = json.loads(line)
        assert (entry["request_id"], entry["message"], entry["level"]) == ("r-1", "something happened", "info")
    else:
        assert "[r-1]" in line
        assert line.endswith("something happened")
