"""What errors become: exit codes, lines on stderr, JSON; and how a command ends when it is left early."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.clients.cli.running import start
from tests.clients.protos import piece
from tests.clients.scripted_server import ScriptedServer, fail, hold

from graftwork.v1 import tuning_pb2 as t


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "base"],
        ["generate", "base", "hi", "--token-ids", "1"],
        ["generate", "base", "--token-ids", "1,x"],
        ["generate", "base", "--token-ids", "1,-2"],
        ["generate", "base", "hi", "--max-tokens", "99999999999"],
        ["generate"],
        ["nonsense"],
        ["adapter", "show", "dates@x"],
        ["adapter", "delete", "dates@x"],
        ["adapter", "delete", "dates@latest"],
        ["adapter", "versions", "dates@1"],
        ["adapter", "create", "dates", "/nowhere/at/all"],
        ["dataset", "check", "/nowhere/at/all"],
        ["tune", "create", "--strategy", "lora", "--data", "/nowhere", "--adapter", "x"],
        ["tune", "create", "--strategy", "lora", "--data", "/nowhere", "--adapter", "x", "--set", "rank"],
        ["tune", "create", "--strategy", "lora", "--data", "/nowhere", "--adapter", "x", "--set", "names=[q_proj]"],
        ["tune", "create", "--strategy", "lora", "--data", __file__, "--validation", "/nowhere", "--adapter", "x"],
    ],
)
def test_bad_usage_exits_with_2(server: ScriptedServer, run: Any, arguments: list[str]) -> None:
    assert run(*arguments, code=2).stderr
    assert server.seen == []


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 1),
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 1),
        (grpc.StatusCode.UNAVAILABLE, 3),
        (grpc.StatusCode.NOT_FOUND, 4),
    ],
)
def test_exit_codes(server: ScriptedServer, run: Any, status: grpc.StatusCode, code: int) -> None:
    server.on("GetAdapter", fail(status, "it failed"))
    result = run("adapter", "show", "dates", code=code)
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: it failed [{status.name}, request ")
    assert result.stderr.count("\n") == 1


def test_violations_have_a_line_each(server: ScriptedServer, run: Any) -> None:
    bad = fail(grpc.StatusCode.INVALID_ARGUMENT, "bad", violations={"sampling.top_p": "is 2", "model": "empty"})
    server.on("Generate", bad)
    lines = run("generate", "base", "hi", code=1).stderr.splitlines()
    assert lines[1:] == ["  --top-p: is 2", "  model: empty"]


def test_errors_as_json(server: ScriptedServer, run: Any) -> None:
    server.on("GetAdapter", fail(grpc.StatusCode.NOT_FOUND, "no x", reason="ADAPTER_NOT_FOUND", request_id="r1"))
    result = run("adapter", "show", "x", "--json", code=4)
    assert result.stdout == ""
    error = json.loads(result.stderr)["error"]
    assert (error["code"], error["reason"], error["request_id"]) == ("NOT_FOUND", "ADAPTER_NOT_FOUND", "r1")
    error = json.loads(run("adapter", "create", "x", "/nowhere", "--json", code=2).stderr)["error"]
    assert error["code"] == "BAD_USAGE"


def test_no_server_exits_with_3(run: Any) -> None:
    result = run("--address", "127.0.0.1:1", "adapter", "list", code=3)
    assert result.stderr == "error: no server listens on 127.0.0.1:1; start one with: graftwork serve\n"
    unknown = run("--address", "nowhere.invalid:1", "adapter", "list", code=3)
    assert unknown.stderr == "error: the host of nowhere.invalid:1 is not known\n"
    assert "127.0.0.1:2" in run("adapter", "list", "--address", "127.0.0.1:2", code=3).stderr


def test_errors_name_options(server: ScriptedServer, run: Any, tmp_path: Path) -> None:
    violations = {"sampling.top_p": "is 3; (0, 1] is accepted"}
    step = fail(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p is 3; (0, 1] is accepted", violations=violations)
    server.on("Generate", step)
    assert run("generate", "base", "hi", "--top-p", "3", code=1).stderr.startswith("error: --top-p is 3; (0, 1] is")
    violations = {"spec.config.r": "is -1", "spec.adapter_id": "is bad"}
    server.on("CreateTuningJob", fail(grpc.StatusCode.INVALID_ARGUMENT, "2 settings", violations=violations))
    server.on("UploadDataset", t.UploadDatasetResponse(dataset=t.Dataset(name="datasets/d", dataset_id="d")))
    (tmp_path / "d.jsonl").write_text("{}")
    arguments = ("--strategy", "lora", "--data", str(tmp_path / "d.jsonl"), "--adapter", "x")
    lines = run("tune", "create", *arguments, code=1).stderr.splitlines()
    assert lines[1:] == ["  --set r: is -1", "  --adapter: is bad"]


def test_text_comes_before_the_end(server: ScriptedServer) -> None:
    gone = threading.Event()
    server.on("Generate", hold([piece("Once", 1)], gone))
    process = start(server, "generate", "base", "hi")
    assert process.stdout is not None
    assert process.stdout.read(4) == b"Once"
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=20)
    assert (rest, errors) == (b"\n", b"")
    assert process.returncode == 130
    assert gone.wait(10)


def test_a_closed_pipe_is_no_traceback(server: ScriptedServer) -> None:
    gone = threading.Event()
    server.on("Generate", hold([piece("x" * 100_000, 1), piece("y", 2)], gone))
    process = start(server, "generate", "base", "hi")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    assert gone.wait(10)
