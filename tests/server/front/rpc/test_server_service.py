"""GetServer over gRPC: what is served, what is loaded, what runs."""

from __future__ import annotations

from importlib import metadata

from tests.server import scripted_engine as script
from tests.server.front.rpc.adapter_harness import create
from tests.waiting import until

from graftwork.v1 import adapters_pb2, generation_pb2, server_pb2


async def described(server) -> server_pb2.Server:
    return (await server.status.GetServer(server_pb2.GetServerRequest())).server


async def test_it_says_what_is_served(make_server):
    server = await make_server(max_queue=7, max_upload_bytes=1 << 20)
    found = await described(server)
    assert found.version == metadata.version("graftwork")
    assert {"python", "torch", "transformers", "grpcio"} <= set(found.versions)
    assert found.engine_ready
    base = found.base_model
    assert (base.display_name, base.dtype, base.device) == ("scripted", "float32", "cpu")
    assert (base.context_tokens, base.vocab_size, base.generates, base.has_tokenizer) == (128, 300, True, True)
    assert (found.limits.max_queue, found.limits.max_upload_bytes) == (7, 1 << 20)
    assert (found.sequence_count, found.adapter_count, found.job_count) == (0, 0, 0)
    assert found.start_time.seconds > 0


async def test_it_says_what_is_loaded_and_what_runs(make_server):
    server = await make_server()
    await create(server, "one")
    await create(server, "two")
    await server.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="adapters/two"))
    request = generation_pb2.GenerateRequest(
        model="base",
        token_ids=generation_pb2.TokenIds(ids=[script.HANG, 97]),
        sampling=generation_pb2.SamplingParameters(max_tokens=100),
    )
    call = server.generation.Generate(request)
    await call.read()
    found = await described(server)
    assert found.adapter_count == 2
    assert list(found.loaded_versions) == ["adapters/two/versions/1"]
    assert found.sequence_count == 1
    call.cancel()
    await until(lambda: server.front.sequence_limit.held == 0)
    assert (await described(server)).sequence_count == 0
