"""What the tests of TuningService share: the calls that bring data sets, and make and watch jobs."""

from __future__ import annotations

import json

from google.protobuf import struct_pb2

from graftwork.v1 import tuning_pb2 as pb

ROWS = b"".join(json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}).encode() + b"\n" for n in range(10))
STATE = pb.TuningJobState


def upload(server, data=ROWS, *, piece=37, **fields):
    first = pb.UploadDatasetRequest(upload=pb.DatasetUpload(**fields))
    rest = [pb.UploadDatasetRequest(data=data[start : start + piece]) for start in range(0, len(data), piece)]
    return server.tuning.UploadDataset(iter([first, *rest]))


def validate(server, data=b"", *, piece=1 << 20, **fields):
    first = pb.ValidateDatasetRequest(check=pb.DatasetCheck(**fields))
    rest = [pb.ValidateDatasetRequest(data=data[start : start + piece]) for start in range(0, len(data), piece)]
    return server.tuning.ValidateDataset(iter([first, *rest]))


async def create(server, adapter_id="tuned", *, config=None, request_id="", **fields):
    dataset = (await upload(server)).dataset.name
    struct = struct_pb2.Struct()
    struct.update(config or {})
    spec = pb.TuningJobSpec(
        **{"strategy": "lora", "dataset": dataset, "adapter_id": adapter_id, "config": struct, **fields}
    )
    answer = await server.tuning.CreateTuningJob(pb.CreateTuningJobRequest(spec=spec, request_id=request_id))
    return answer.job


async def job_of(server, name):
    return (await server.tuning.GetTuningJob(pb.GetTuningJobRequest(name=name))).job


async def watch(server, name, after=0):
    call = server.tuning.WatchTuningJob(pb.WatchTuningJobRequest(name=name, after_sequence=after))
    return [message.event async for message in call]
