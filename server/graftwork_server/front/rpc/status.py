"""ServerService: what is served, within which limits, and what goes on."""

from __future__ import annotations

import asyncio
import datetime
import platform
from importlib import metadata

import grpc

from graftwork.v1 import server_pb2 as pb
from graftwork.v1.server_pb2_grpc import ServerServiceServicer
from graftwork_server.config import ServerConfig
from graftwork_server.front.engine_client import EngineClient
from graftwork_server.front.rpc.convert import job_message, timestamp
from graftwork_server.front.rpc.limits import SequenceLimit, context_limit
from graftwork_server.hub.hub import Hub

MAX_LOADED = 1000
MAX_JOBS = 100
LIBRARIES = ("torch", "transformers", "peft", "grpcio", "protobuf", "tokenizers", "safetensors", "llguidance")


class ServerService(ServerServiceServicer):
    """Describes the server that it was made in, which has begun to answer just now."""

    def __init__(self, config: ServerConfig, engine: EngineClient, hub: Hub, sequence_limit: SequenceLimit) -> None:
        self._config = config
        self._engine = engine
        self._hub = hub
        self._sequence_limit = sequence_limit
        self._versions = _versions()
        self._start_time = timestamp(datetime.datetime.now(datetime.UTC))

    async def GetServer(self, request: pb.GetServerRequest, context: grpc.aio.ServicerContext) -> pb.GetServerResponse:
        """The server at this moment."""
        return pb.GetServerResponse(server=await asyncio.to_thread(self._server, set(self._engine.loaded)))

    def _server(self, loaded: set[str]) -> pb.Server:
        jobs = self._hub.jobs.unfinished()
        versions = self._hub.registry.versions_of(loaded)
        return pb.Server(
            version=metadata.version("graftwork"),
            versions=self._versions,
            start_time=self._start_time,
            engine_ready=self._engine.ready,
            base_model=self._base_model(),
            limits=self._limits(),
            loaded_versions=[version.name for version in versions[:MAX_LOADED]],
            adapter_count=self._hub.registry.adapter_count(),
            sequence_count=self._sequence_limit.held,
            jobs=[job_message(job) for job in jobs[:MAX_JOBS]],
            job_count=len(jobs),
        )

    def _base_model(self) -> pb.BaseModel:
        model = self._engine.model
        return pb.BaseModel(
            display_name=self._config.base_name,
            fingerprint=model.fingerprint,
            architecture=model.architecture,
            dtype=model.dtype,
            device=model.device,
            quantization=model.quantization,
            parameter_count=model.parameter_count,
            weight_bytes=model.weight_bytes,
            context_tokens=context_limit(model),
            vocab_size=model.vocab_size,
            generates=model.generates,
            has_tokenizer=model.tokenizer_dir is not None,
        )

    def _limits(self) -> pb.ServerLimits:
        model = self._engine.model
        return pb.ServerLimits(
            max_sequences=model.max_sequences,
            max_queue=self._config.max_queue,
            max_step_tokens=self._config.max_step_tokens,
            kv_cache_tokens=model.kv_tokens,
            max_upload_bytes=self._config.max_upload_bytes,
            max_dataset_bytes=self._config.max_dataset_bytes,
            max_concurrent_jobs=self._config.max_concurrent_jobs,
        )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
