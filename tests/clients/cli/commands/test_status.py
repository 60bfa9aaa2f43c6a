"""graftwork status."""

from __future__ import annotations

from typing import Any

from tests.clients.cli.running import objects
from tests.clients.protos import job
from tests.clients.scripted_server import ScriptedServer

from graftwork.v1 import server_pb2


def test_status_shows_what_is_served_and_what_goes_on(server: ScriptedServer, run: Any) -> None:
    described = server_pb2.Server(
        version="1.2",
        versions={"torch": "2.13"},
        engine_ready=True,
        base_model=server_pb2.BaseModel(display_name="tiny", dtype="bfloat16", device="cpu", context_tokens=2048),
        limits=server_pb2.ServerLimits(max_queue=1024, max_concurrent_jobs=1),
        loaded_versions=["adapters/dates/versions/3"],
        adapter_count=2,
        sequence_count=5,
        jobs=[job(job_id="j9")],
        job_count=1,
    )
    server.on("GetServer", server_pb2.GetServerResponse(server=described))
    text = run("status").stdout
    for words in (
        "tiny",
        "bfloat16 on cpu",
        "2,048 tokens",
        "5 wait or run",
        "dates@3",
        "1 not ended",
        "torch 2.13",
        "j9",
    ):
        assert words in text, text
    (found,) = objects(run("status", "--json"))
    assert found["base_model"]["context_tokens"] == 2048
    assert found["jobs"][0]["job_id"] == "j9"
    assert found["versions"] == {"torch": "2.13"}
