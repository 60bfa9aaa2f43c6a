"""Health and reflection, as grpcurl and load balancers ask for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.e2e.serving import Server

METHODS = {
    "GenerationService": {"Generate", "Chat", "Score", "Classify", "Embed", "Tokenize"},
    "AdapterService": {
        "CreateAdapter",
        "GetAdapter",
        "ListAdapters",
        "ListVersions",
        "DeleteAdapter",
        "LoadAdapter",
        "UnloadAdapter",
        "PinAdapter",
        "UnpinAdapter",
        "DeleteVersion",
    },
    "TuningService": {
        "UploadDataset",
        "GetDataset",
        "ListDatasets",
        "DeleteDataset",
        "DeleteTuningJob",
        "ValidateDataset",
        "CreateTuningJob",
        "GetTuningJob",
        "ListTuningJobs",
        "CancelTuningJob",
        "WatchTuningJob",
    },
    "StrategyService": {"ListStrategies", "GetStrategy"},
    "ServerService": {"GetServer"},
}


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as connected:
        yield connected


def reflect(channel: grpc.Channel, **request: str) -> reflection_pb2.ServerReflectionResponse:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    return next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=240))


def test_reflection_lists_every_service_with_every_method(channel: grpc.Channel) -> None:
    listed = {service.name for service in reflect(channel, list_services="").list_services_response.service}
    assert listed >= {f"graftwork.v1.{name}" for name in METHODS} | {"grpc.health.v1.Health"}
    for name, methods in METHODS.items():
        answer = reflect(channel, file_containing_symbol=f"graftwork.v1.{name}").file_descriptor_response
        files = [FileDescriptorProto.FromString(data) for data in answer.file_descriptor_proto]
        service = next(service for file in files for service in file.service if service.name == name)
        assert {method.name for method in service.method} == methods


def test_reflection_finds_a_single_method(channel: grpc.Channel) -> None:
    """What `grpcurl describe graftwork.v1.GenerationService.Chat` asks for."""
    answer = reflect(channel, file_containing_symbol="graftwork.v1.GenerationService.Chat").file_descriptor_response
    files = [FileDescriptorProto.FromString(data) for data in answer.file_descriptor_proto]
    assert "GenerationService" in [service.name for file in files for service in file.service]
    unknown = reflect(channel, file_containing_symbol="graftwork.v1.GenerationService.Sing")
    assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_every_listed_method_is_there(channel: grpc.Channel) -> None:
    """An empty request may be refused, but no method may be unknown or fall over."""
    for name, methods in METHODS.items():
        for method in methods:
            call = channel.stream_stream(f"/graftwork.v1.{name}/{method}")(iter([b""]), timeout=240)
            with contextlib.suppress(grpc.RpcError):
                list(call)
            assert call.code() in (
                grpc.StatusCode.OK,
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.NOT_FOUND,
            ), f"{method}: {call.code()} {call.details()}"


@pytest.mark.parametrize("service", ["", *(f"graftwork.v1.{name}" for name in METHODS)])
def test_health_says_serving(channel: grpc.Channel, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=240)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
