"""What the tests of AdapterService share: the files of an adapter, and the calls that bring and read it."""

from __future__ import annotations

import hashlib
import json

from tests.server import scripted_engine as script

from graftwork.v1 import adapters_pb2 as pb
from graftwork.v1 import generation_pb2


def files_of(seed="", **config) -> dict[str, bytes]:
    return {
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 8, **config}).encode(),
        "adapter_model.safetensors": script.safetensors_bytes(seed),
    }


def upload_of(adapter_id, files, *, sha256=True, **fields) -> pb.CreateAdapterRequest:
    infos = [
        pb.FileInfo(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest() if sha256 else "")
        for name, data in files.items()
    ]
    return pb.CreateAdapterRequest(upload=pb.AdapterUpload(adapter_id=adapter_id, files=infos, **fields))


def chunk(name, data) -> pb.CreateAdapterRequest:
    return pb.CreateAdapterRequest(chunk=pb.FileChunk(name=name, data=data))


def requests_of(adapter_id, files, *, piece=50, **fields) -> list[pb.CreateAdapterRequest]:
    chunks = [
        chunk(name, data[start : start + piece]) for name, data in files.items() for start in range(0, len(data), piece)
    ]
    return [upload_of(adapter_id, files, **fields), *chunks]


def create(server, adapter_id, files=None, **fields):
    return server.adapters.CreateAdapter(iter(requests_of(adapter_id, files or files_of(adapter_id), **fields)))


def get(server, name):
    return server.adapters.GetAdapter(pb.GetAdapterRequest(name=name))


def staged(server) -> list:
    return list((server.data / "staging").iterdir())


async def generate(server, model, **sampling):
    call = server.generation.Generate(
        generation_pb2.GenerateRequest(
            model=model, text="a", sampling=generation_pb2.SamplingParameters(max_tokens=2, **sampling)
        )
    )
    return [message async for message in call]
