"""`graftwork serve` as a process, with the scripted engine: what it prints, how it fails, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from tests.server import scripted_engine as script

from graftwork.v1 import generation_pb2 as pb
from graftwork.v1.generation_pb2_grpc import GenerationServiceStub
from graftwork_server import logs
from graftwork_server.front.serve import main

PROGRAM = Path(__file__).parents[1] / "scripted_serve.py"


@pytest.fixture
def serve(tmp_path):
    """Starts `graftwork serve`; returns the process. All are gone at the end."""
    processes = []

    def start(*flags, data_dir="data", options=None):
        path = tmp_path / f"scripted-{len(processes)}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"step_ms": 20, **(options or {})}))
        command = [sys.executable, str(PROGRAM), "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / data_dir)]
        process = subprocess.Popen(
            [*command, "--model", str(path), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={key: value for key, value in os.environ.items() if not key.startswith("GRAFTWORK_")},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def address_of(process) -> str:
    line = process.stdout.readline()
    assert line.startswith("graftwork: serving base 'scripted-0'"), line + process.stderr.read()
    assert "(1.2K parameters, float32 on cpu) on 127.0.0.1:" in line
    return line.split()[-1]


def failure(process) -> tuple[int, str]:
    """Exit code and the one line on stderr that says why."""
    out, err = process.communicate(timeout=30)
    lines = [line for line in err.splitlines() if line.startswith("graftwork: ")]
    assert "Traceback" not in err
    assert len(lines) == 1, err
    assert out == ""
    return process.returncode, lines[0]


def stream(address, first=97, max_tokens=40):
    channel = grpc.insecure_channel(address)
    request = pb.GenerateRequest(
        model="base",
        token_ids=pb.TokenIds(ids=[first]),
        sampling=pb.SamplingParameters(max_tokens=max_tokens),
    )
    return GenerationServiceStub(channel).Generate(request, timeout=20, wait_for_ready=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_streams_finish(serve, number):
    process = serve()
    call = stream(address_of(process))
    tokens = list(next(call).token_ids)
    process.send_signal(number)
    for message in call:
        tokens += message.token_ids
    assert tokens == list(range(98, 138))
    assert message.finish_reason == pb.FINISH_REASON_LENGTH
    assert process.wait(10) == 0


def test_what_does_not_finish_in_time_is_broken_off(serve):
    process = serve("--drain-seconds", "0.2")
    call = stream(address_of(process), first=script.HANG)
    next(call)
    process.terminate()
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert process.wait(10) == 0


def test_a_second_signal_ends_at_once(serve):
    process = serve("--drain-seconds", "60")
    call = stream(address_of(process), first=script.HANG)
    next(call)
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(5) == 130
    with pytest.raises(grpc.RpcError):
        list(call)


def test_an_engine_that_cannot_start_is_one_line(serve):
    code, line = failure(serve(options={"start_failed": "there is no model at 'nowhere'"}))
    assert (code, line) == (1, "graftwork: there is no model at 'nowhere'")


def test_an_engine_that_keeps_dying_ends_the_server(serve):
    process = serve(options={"exit_after_ms": 10})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("graftwork: gave up after 5 failures")
    assert "serving base" in out


def test_it_says_what_it_does_while_it_starts_and_each_wrong_setting_once(serve):
    process = serve()
    lines = [process.stderr.readline(), process.stderr.readline()]
    assert "starting: opening the data directory" in lines[0]
    assert "starting: the engine for base 'scripted-0' (it imports torch first), to serve on 127.0.0.1:" in lines[1]
    process = serve("--max-queue", "0", "--nonsense", "--kv-memory-bytes", "2G")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert [line.partition(": ")[2].partition(":")[0] for line in err.splitlines()] == [
        "flag --nonsense",
        "flag --max-queue",
        "flag --kv-memory-bytes",
    ]


def test_a_data_directory_has_one_server(serve):
    address_of(serve())
    code, line = failure(serve())
    assert code == 1
    assert "another graftwork server uses this data directory" in line


def test_a_data_directory_that_cannot_be_used_is_named(serve, tmp_path):
    (tmp_path / "file").touch()
    for path in ("file", "file/below", "damaged"):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "registry.db").write_bytes(b"x" * 5000)
        code, line = failure(serve(data_dir=path))
        assert code == 1
        assert line.startswith(f"graftwork: --data-dir '{tmp_path / path}': the ")
        assert ("a file stands in its place" in line) == path.startswith("file")


def test_a_port_has_one_server(serve):
    address = address_of(serve())
    code, line = failure(serve("--listen", address, data_dir="other"))
    assert code == 1
    assert "port is in use" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--listen", "0.0.0.0:0"], "--insecure"),
        (["--listen", "nowhere.invalid:0", "--insecure"], "not known"),
        (["--threads", "many"], "flag --threads"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_unusable_settings_end_with_code_2(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(logs, "set_up", lambda *_: None)
    assert main(flags, {}) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_print_config_prints_and_ends(capsys):
    assert main(["--print-config", "--threads", "2"], {}) == 0
    assert "threads = 2  # flag --threads" in capsys.readouterr().out


def test_log_lines_are_json_if_asked_for(serve):
    process = serve("--log-format", "json")
    call = stream(address_of(process), max_tokens=1)
    threading.Timer(0.5, process.terminate).start()
    list(call)
    _, err = process.communicate(timeout=20)
    entries = [json.loads(line) for line in err.splitlines()]
    access = next(entry for entry in entries if entry["logger"] == "graftwork.access")
    assert access["message"] == "Generate OK"
    assert len(access["request_id"]) == 16
    assert (access["method"], access["outcome"], access["model"]) == ("Generate", "OK", "base")
    assert "version" not in access, "the base has none"
    assert (access["prompt_tokens"], access["completion_tokens"]) == (1, 1)
    assert 0 < access["first_token_ms"] <= access["total_ms"]
