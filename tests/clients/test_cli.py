"""The command line in this process: what each command sends, prints and exits with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2
from tests.clients.protos import adapter, as_chat, event, job, last, piece, step_event, succeeded
from tests.clients.scripted_server import ScriptedServer, fail
from typer.testing import CliRunner, Result

from graftwork.cli.app import app
from graftwork.v1 import adapters_pb2 as a
from graftwork.v1 import generation_pb2 as g
from graftwork.v1 import server_pb2
from graftwork.v1 import strategies_pb2 as s
from graftwork.v1 import tuning_pb2 as t

runner = CliRunner()


@pytest.fixture
def run(server: ScriptedServer) -> Any:
    def invoke(*arguments: str, stdin: str = "", code: int = 0) -> Result:
        result = runner.invoke(app, list(arguments), input=stdin, env={"GRAFTWORK_ADDRESS": server.address})
        assert result.exit_code == code, result.output + result.stderr
        assert "Traceback" not in result.output + result.stderr
        return result

    return invoke


def objects(result: Result) -> list[Any]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_generate_prints_the_text(server: ScriptedServer, run: Any) -> None:
    server.on("Generate", [piece("Once ", 1), piece("upon", 2), last()])
    assert run("generate", "base", "Say").stdout == "Once upon\n"
    assert server.requests("Generate")[0] == g.GenerateRequest(model="base", text="Say", sampling={})


def test_generate_json(server: ScriptedServer, run: Any) -> None:
    server.on("Generate", [piece("ü", 1, logprobs=[-0.5]), last()])
    (answer,) = objects(run("generate", "dates@3", "Say", "--logprobs", "0", "--json"))
    assert answer == {
        "text": "ü",
        "token_ids": [1],
        "finish_reason": "stop",
        "logprobs": [{"token_id": 1, "text": "ü", "logprob": -0.5, "top": []}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0},
        "model": "m",
        "version": 3,
        "completions": [{"index": 0, "score": None} | {key: answer[key] for key in COMPLETION}],
        "prompt_logprobs": None,
    }


def test_generate_new_options(server: ScriptedServer, run: Any, tmp_path: Any) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    server.on("Generate", [last(), last(), last(), last()])
    flags = "--min-p 0.5 --repetition-penalty 2 --presence-penalty 1 --frequency-penalty 0.5 --min-tokens 3 --echo"
    objects(run("generate", "base", "x", *flags.split(), "--n", "1", "--best-of", "4", "--regex", "a+", "--json"))
    objects(run("generate", "base", "x", "--json-schema", str(schema), "--json"))
    objects(run("generate", "base", "x", "--choice", "a", "--choice", "b", "--json"))
    first, second, third = (request.sampling for request in server.requests("Generate"))
    assert first == g.SamplingParameters(
        min_p=0.5,
        repetition_penalty=2,
        presence_penalty=1,
        frequency_penalty=0.5,
        min_tokens=3,
        echo=True,
        n=1,
        best_of=4,
        structured_output=g.StructuredOutput(regex="a+"),
    )
    assert second.structured_output.json_schema == '{"type": "object"}'
    assert list(third.structured_output.choice.texts) == ["a", "b"]


def test_several_completions_are_printed_one_after_the_other(server: ScriptedServer, run: Any) -> None:
    stop, usage = g.FINISH_REASON_STOP, g.Usage(prompt_tokens=1, completion_tokens=2)
    second = g.GenerateResponse(text="two", index=1, finish_reason=stop, score=-1.5)
    first = g.GenerateResponse(text="one", index=0, finish_reason=stop, score=-0.5, usage=usage)
    server.on("Generate", [second, first])
    shown = run("generate", "base", "x", "--n", "2", "--best-of", "2").stdout
    assert shown == "--- 0  score -0.5000\none\n--- 1  score -1.5000\ntwo\n"


def test_several_completions_have_their_logprobs_in_text(server: ScriptedServer, run: Any) -> None:
    stop, usage = g.FINISH_REASON_STOP, g.Usage(prompt_tokens=1, completion_tokens=2)
    second = g.GenerateResponse(index=1, finish_reason=stop)
    second.MergeFrom(piece("b", 2, logprobs=[-2.5]))
    first = g.GenerateResponse(finish_reason=stop, usage=usage)
    first.MergeFrom(piece("a", 1, logprobs=[-0.5]))
    server.on("Generate", [second, first])
    lines = run("generate", "base", "x", "--n", "2", "--logprobs", "0").stdout.splitlines()
    header = "token  text  logprob"
    assert lines == ["--- 0", "a", header, "1      'a'   -0.500000", "--- 1", "b", header, "2      'b'   -2.500000"]


COMPLETION = ("text", "token_ids", "finish_reason", "logprobs")


def test_generate_options(server: ScriptedServer, run: Any) -> None:
    server.on("Generate", [last()])
    flags = "--max-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 4 --seed 7 --stop A --stop B --ignore-eos"
    (answer,) = objects(run("generate", "base", "--token-ids", "1,2, 3", *flags.split(), "--json"))
    assert answer["logprobs"] is None
    sampling = g.SamplingParameters(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=4, seed=7, stop=["A", "B"], ignore_eos=True
    )
    request = g.GenerateRequest(model="base", token_ids=g.TokenIds(ids=[1, 2, 3]), sampling=sampling)
    assert server.requests("Generate")[0] == request


def test_generate_logprobs_as_text(server: ScriptedServer, run: Any) -> None:
    server.on("Generate", [piece("a", 1, logprobs=[-0.5]), last()])
    lines = run("generate", "base", "Say", "--logprobs", "0").stdout.splitlines()
    assert lines == ["a", "", "token  text  logprob", "1      'a'   -0.500000"]


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


def test_score(server: ScriptedServer, run: Any) -> None:
    entries = [g.TokenLogprob(token_id=1, text="a"), g.TokenLogprob(token_id=22, text="b", logprob=-2.0)]
    server.on("Score", g.ScoreResponse(tokens=entries, total_logprob=-2.0, model="dates", version=2))
    (result,) = objects(run("score", "dates", "ab", "--json"))
    assert [token["logprob"] for token in result["tokens"]] == [None, -2.0]
    assert result["total_logprob"] == -2.0
    assert run("score", "dates", "ab").stdout.splitlines()[1:] == [
        "1      'a'   -",
        "22     'b'   -2.000000",
        "total -2.000000 (2 tokens, dates@2)",
    ]


def test_chat_reads_a_message_per_line(server: ScriptedServer, run: Any) -> None:
    server.on("Chat", [as_chat(last("one"))], [as_chat(last("two"))], [as_chat(last("three"))])
    result = run("chat", "base", "--system", "Be brief.", stdin="Hi\n\nAnd?\n/reset\nNew\n/exit\nnever\n")
    assert result.stdout == "one\ntwo\nthree\n"
    said = [[(m.role, m.content) for m in request.messages] for request in server.requests("Chat")]
    system = ("system", "Be brief.")
    assert said == [
        [system, ("user", "Hi")],
        [system, ("user", "Hi"), ("assistant", "one"), ("user", "And?")],
        [system, ("user", "New")],
    ]


def test_chat_json_and_failure(server: ScriptedServer, run: Any) -> None:
    server.on("Chat", [as_chat(last("one"))], fail(grpc.StatusCode.INVALID_ARGUMENT, "too long"))
    result = run("chat", "base", "--json", stdin="Hi\nAnd?\nNever\n", code=1)
    assert [answer["text"] for answer in objects(result)] == ["one"]
    assert json.loads(result.stderr)["error"]["message"] == "too long"
    assert len(server.seen) == 2


def test_adapter_commands(server: ScriptedServer, run: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    report = a.LoadReport(modules_bound=12, rank=8, device_bytes=2000, load_ms=3.25)
    server.on("CreateAdapter", a.CreateAdapterResponse(adapter=adapter(loaded=True), load_report=report))
    server.on("ListAdapters", a.ListAdaptersResponse(adapters=[adapter(), adapter("much-longer")]))
    newer = adapter(version=2, loaded=True, pinned=True)
    server.on("ListVersions", a.ListVersionsResponse(versions=[newer, adapter()]))
    server.on("LoadAdapter", a.LoadAdapterResponse(adapter=adapter(), load_report=report))
    unpinned = a.UnloadAdapterResponse(adapter=adapter(), unpinned=True)
    server.on("UnloadAdapter", a.UnloadAdapterResponse(adapter=adapter()), unpinned)
    server.on("PinAdapter", a.PinAdapterResponse(adapter=adapter(pinned=True), load_report=report))
    server.on("UnpinAdapter", a.UnpinAdapterResponse(adapter=adapter()))
    server.on("DeleteAdapter", a.DeleteAdapterResponse(deleted_versions=2))
    server.on("GetAdapter", fail(grpc.StatusCode.NOT_FOUND), a.GetAdapterResponse(adapter=adapter()))
    created = run("adapter", "create", "dates", str(tmp_path), "--strategy", "lora", "--new-version", "--load").stdout
    assert created.startswith("published dates@1\n")
    assert "12 modules, rank 8, 2.0 kB, in 3.2 ms" in created
    upload = server.requests("CreateAdapter")[0][0].upload
    assert (upload.strategy, upload.new_version, upload.load) == ("lora", True, True)
    header, first, second = run("adapter", "list").stdout.splitlines()
    assert header.split() == ["ADAPTER", "VERSION", "STRATEGY", "LOADED", "PINNED", "RANK", "SIZE", "CREATED"]
    assert first.split() == ["dates", "1", "lora", "no", "no", "8", "1.5", "MB", "-"]
    assert header.index("VERSION") == second.index("1")
    ids = [item["adapter_id"] for item in objects(run("adapter", "list", "--json"))[0]]
    assert ids == ["dates", "much-longer"]
    header, newest, oldest = run("adapter", "versions", "dates").stdout.splitlines()
    assert header.split()[:4] == ["VERSION", "STRATEGY", "LOADED", "PINNED"]
    assert newest.split()[:4] == ["dates@2", "lora", "yes", "yes"]
    assert oldest.startswith("dates@1")
    assert server.requests("ListVersions")[0].parent == "adapters/dates"
    assert [item["version"] for item in objects(run("adapter", "versions", "dates", "--json"))[0]] == [2, 1]
    assert "dates@1" in run("adapter", "show", "dates").stdout
    assert run("adapter", "load", "dates@1").stdout.startswith("loaded dates@1\n")
    assert objects(run("adapter", "load", "dates", "--json"))[0]["load_report"]["modules_bound"] == 12
    assert run("adapter", "unload", "dates").stdout == "unloaded dates@1\n"
    assert run("adapter", "unload", "dates").stdout == "unloaded dates@1; it was pinned, and is no more\n"
    assert run("adapter", "pin", "dates").stdout.startswith("pinned dates@1\n")
    assert objects(run("adapter", "pin", "dates", "--json"))[0]["pinned"] is True
    assert run("adapter", "unpin", "dates").stdout == "unpinned dates@1\n"
    assert run("adapter", "delete", "dates").stdout == "deleted dates (2 versions)\n"
    assert objects(run("adapter", "delete", "dates", "--json")) == [{"adapter_id": "dates", "deleted_versions": 2}]


def test_the_same_files_again_are_not_called_published(server: ScriptedServer, run: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter(version=2)))
    server.on("CreateAdapter", *(a.CreateAdapterResponse(adapter=adapter(version=version)) for version in (2, 3)))
    again = run("adapter", "create", "dates", str(tmp_path), "--new-version").stdout
    assert again.startswith("nothing new: dates@2 has the same files\n")
    assert run("adapter", "create", "dates", str(tmp_path), "--new-version").stdout.startswith("published dates@3\n")


@pytest.mark.parametrize(
    ("command", "asked", "deletes"),
    [
        (("adapter", "delete", "dates"), "GetAdapter", "DeleteAdapter"),
        (("adapter", "delete", "dates@7"), "GetAdapter", "DeleteVersion"),
        (("dataset", "delete", "ds-1"), "GetDataset", "DeleteDataset"),
        (("tune", "delete", "j1"), "GetTuningJob", "DeleteTuningJob"),
    ],
)
def test_what_is_not_there_is_said_before_the_question(
    server: ScriptedServer, run: Any, command: tuple[str, ...], asked: str, deletes: str
) -> None:
    server.on(asked, fail(grpc.StatusCode.NOT_FOUND, "there is no such thing"))
    assert "there is no such thing" in run(*command, code=4).stderr
    assert server.requests(deletes) == []


def test_strategy_commands(server: ScriptedServer, run: Any) -> None:
    rank = {"default": 8, "description": "Rank of the update."}
    schema = {"properties": {"rank": rank, "name": {"type": "string"}}, "required": ["name"]}
    lora = s.Strategy(strategy_id="lora", description="Low rank.", config_json_schema=json.dumps(schema))
    broken = s.Strategy(strategy_id="x", load_error="ImportError: no\nmodule")
    server.on("ListStrategies", s.ListStrategiesResponse(strategies=[lora, broken]))
    server.on("GetStrategy", s.GetStrategyResponse(strategy=lora))
    listed = run("strategy", "list").stdout
    assert "NOT LOADED: ImportError: no module\n" in listed
    assert [item["strategy_id"] for item in objects(run("strategy", "list", "--json"))[0]] == ["lora", "x"]
    lines = run("strategy", "show", "lora").stdout.splitlines()
    assert lines[-2:] == ["rank     8           Rank of the update.", "name     (required)  string"]
    assert objects(run("strategy", "show", "lora", "--json"))[0]["config_schema"] == schema


ESTIMATE = "3 steps, 1,234 parameters, 2.5 MB more memory, artifact 900 B"


@pytest.fixture
def tuning(server: ScriptedServer, tmp_path: Path) -> list[str]:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    held_out = tmp_path / "v.jsonl"
    held_out.write_text('{"text": "b"}\n')

    def store(request: Any, context: grpc.ServicerContext) -> t.UploadDatasetResponse:
        name = request[0].upload.display_name
        return t.UploadDatasetResponse(dataset=t.Dataset(name=f"datasets/{name}", dataset_id=name))

    server.on("UploadDataset", store)
    estimate = t.TuningEstimate(trained_parameters=1234, memory_bytes=2_500_000, artifact_bytes=900, total_steps=3)
    pending = job(t.TUNING_JOB_STATE_PENDING, estimate=estimate)
    server.on("CreateTuningJob", t.CreateTuningJobResponse(job=pending))
    server.on(
        "WatchTuningJob",
        [
            event(1, state=t.TUNING_JOB_STATE_RUNNING),
            step_event(2, 1),
            event(3, evaluation=t.TuningEvaluation(step=1, loss=0.25)),
            event(4, checkpoint_step=1),
            event(5, message="resumed"),
            event(6, state=t.TUNING_JOB_STATE_SUCCEEDED),
        ],
    )
    server.on("GetTuningJob", t.GetTuningJobResponse(job=succeeded()))
    create = ["tune", "create", "--strategy", "lora", "--adapter", "dates"]
    return [*create, "--data", str(data), "--validation", str(held_out)]


def test_tune_create(server: ScriptedServer, run: Any, tuning: list[str]) -> None:
    sets = ["rank=16", "learning_rate=2e-4", "target_modules=all-linear", 'names=["a"]', "x=", "load=null"]
    flags = [part for setting in sets for part in ("--set", setting)]
    (created,) = objects(run(*tuning, *flags, "--load", "--json"))
    assert (created["job_id"], created["state"]) == ("j1", "pending")
    assert created["spec"]["config"] == {"rank": 8, "learning_rate": 0.0002}
    assert [seen.method for seen in server.seen] == [
        "CreateTuningJob",  # validates only, before anything is uploaded
        "UploadDataset",
        "UploadDataset",
        "CreateTuningJob",
    ]
    checked, asked = server.requests("CreateTuningJob")
    assert (checked.validate_only, asked.validate_only) == (True, False)
    assert (checked.spec.config, checked.spec.dataset) == (asked.spec.config, "")
    assert not asked.spec.new_version
    run(*tuning, "--new-version")
    assert all(request.spec.new_version for request in server.requests("CreateTuningJob")[2:])
    spec = asked.spec
    assert (spec.dataset, spec.validation_dataset, spec.load) == ("datasets/d.jsonl", "datasets/v.jsonl", True)
    config = spec.config
    assert (config["rank"], config["learning_rate"]) == (16.0, 2e-4)
    assert (config["target_modules"], config["x"], config["load"]) == ("all-linear", "", None)
    assert list(config["names"]) == ["a"]
    shown = run(*tuning).stdout
    assert shown.startswith("job       j1\n")
    assert f"estimate  {ESTIMATE}\n" in shown


def test_tune_show_says_what_was_chosen_and_why(server: ScriptedServer, run: Any) -> None:
    chosen = [
        t.SettingChoice(key="max_steps", value=struct_pb2.Value(number_value=150), reason="why", automatic=True),
        t.SettingChoice(key="rank", value=struct_pb2.Value(number_value=8), reason="set in the request"),
    ]
    server.on("GetTuningJob", t.GetTuningJobResponse(job=job(choices=chosen)))
    lines = [line for line in run("tune", "show", "j1").stdout.splitlines() if line.startswith("chosen")]
    assert [" ".join(line.split()) for line in lines] == ["chosen max_steps=150: why"]


def test_tune_follow_in_plain_lines(run: Any, tuning: list[str]) -> None:
    lines = run(*tuning, "--follow").stdout.splitlines()
    assert lines[:8] == [
        "job j1",
        f"estimate  {ESTIMATE}",
        "running",
        "step 1/3  loss 1.5000  lr 2.00e-04  1234 tok/s  ETA 5.0s",
        "step 1  held-out loss 0.2500",
        "checkpoint at step 1",
        "resumed",
        "succeeded",
    ]
    assert "version        adapters/dates/versions/2" in lines
    assert "training loss  0.5000, the mean of the last tenth of the steps" in lines
    assert "trained        10 parameters in 1m05s" in lines


def test_tune_follow_as_json(run: Any, tuning: list[str]) -> None:
    *events, ended = objects(run(*tuning, "--follow", "--json"))
    assert [item["sequence"] for item in events] == [1, 2, 3, 4, 5, 6]
    assert ended["result"]["adapter_version"] == "adapters/dates/versions/2"


def test_a_failed_job_exits_with_5(server: ScriptedServer, run: Any, tuning: list[str]) -> None:
    failed = job(t.TUNING_JOB_STATE_FAILED, error="loss is NaN", error_reason="LOSS_NOT_FINITE")
    server.on("GetTuningJob", t.GetTuningJobResponse(job=failed))
    server.on("WatchTuningJob", [event(1, state=t.TUNING_JOB_STATE_FAILED)])
    assert run(*tuning, "--follow", code=5).stderr == "error: tuning job j1 failed: loss is NaN\n"
    result = run("tune", "watch", "j1", "--json", code=5)
    assert objects(result)[-1]["state"] == "failed"
    assert json.loads(result.stderr)["error"]["code"] == "JOB_FAILED"
    assert "loss is NaN [LOSS_NOT_FINITE]" in run("tune", "show", "j1").stdout


def test_tune_list_watch_cancel(server: ScriptedServer, run: Any, tuning: list[str]) -> None:
    server.on("ListTuningJobs", t.ListTuningJobsResponse(jobs=[job(), succeeded("j2")]))
    server.on("CancelTuningJob", t.CancelTuningJobResponse(job=job(t.TUNING_JOB_STATE_CANCELLED)))
    assert [line.split()[0] for line in run("tune", "list").stdout.splitlines()] == ["JOB", "j1", "j2"]
    assert [item["job_id"] for item in objects(run("tune", "list", "--json"))[0]] == ["j1", "j2"]
    assert "running" in run("tune", "watch", "j1", "--after-sequence", "0").stdout
    assert run("tune", "cancel", "j1").stdout == "job j1 cancelled\n"
    server.on("GetTuningJob", fail(grpc.StatusCode.NOT_FOUND))
    run("tune", "watch", "j9", code=4)


def test_dataset_check(server: ScriptedServer, run: Any, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(b"x")
    bad = [t.LineError(line=n, reason=f"reason {n}") for n in (2, 7)]
    server.on("ValidateDataset", t.ValidateDatasetResponse(errors=bad, error_count=5, row_count=1))
    lines = run("dataset", "check", str(data), "--max-sequence-tokens", "32", code=1).stdout.splitlines()
    assert lines[:3] == [f"{data}:2: reason 2", f"{data}:7: reason 7", "... and 3 more problems"]
    assert server.requests("ValidateDataset")[0][0].check.max_sequence_tokens == 32
    assert objects(run("dataset", "check", str(data), "--json", code=1))[0]["error_count"] == 5
    server.on("ValidateDataset", t.ValidateDatasetResponse(errors=[t.LineError(reason="no rows")], error_count=1))
    assert run("dataset", "check", str(data), code=1).stdout.startswith(f"{data}: no rows\n")
    server.on("ValidateDataset", t.ValidateDatasetResponse(valid=True, format=t.DATASET_FORMAT_CHAT))
    assert "chat" in run("dataset", "check", str(data)).stdout


def test_numbers_that_json_does_not_know(server: ScriptedServer, run: Any) -> None:
    server.on("Score", g.ScoreResponse(total_logprob=float("-inf")))
    assert objects(run("score", "base", "x", "--json"))[0]["total_logprob"] is None


def test_help_tells_the_exit_codes_and_commands(run: Any) -> None:
    text = run("--help").stdout
    for word in ("serve", "generate", "chat", "score", "adapter", "strategy", "tune", "dataset", "130  interrupted"):
        assert word in text
    assert run("--version").stdout.startswith("graftwork 0.")


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


def test_one_version_is_deleted(server: ScriptedServer, run: Any) -> None:
    server.on("DeleteVersion", a.DeleteVersionResponse(newest_version=1))
    server.on("GetAdapter", a.GetAdapterResponse(adapter=adapter(version=1)))
    assert run("adapter", "delete", "dates@2").stdout == "deleted dates@2; dates means version 1 now\n"
    present, gone = a.GetAdapterResponse(adapter=adapter()), fail(grpc.StatusCode.NOT_FOUND)
    server.on("GetAdapter", present, gone, present)
    assert run("adapter", "delete", "dates@1").stdout == "deleted dates@1; it was the last version of dates\n"
    assert objects(run("adapter", "delete", "dates@1", "--json")) == [{"adapter_id": "dates", "deleted_versions": 1}]


def test_data_sets_and_jobs_are_listed_and_deleted(server: ScriptedServer, run: Any) -> None:
    stored = t.Dataset(
        name="datasets/ds-1",
        dataset_id="ds-1",
        display_name="rows.jsonl",
        format=t.DATASET_FORMAT_CHAT,
        row_count=12345,
        size_bytes=2_000_000,
    )
    server.on("ListDatasets", t.ListDatasetsResponse(datasets=[stored]))
    server.on("GetDataset", t.GetDatasetResponse(dataset=stored))
    server.on("DeleteDataset", t.DeleteDatasetResponse())
    server.on("GetTuningJob", t.GetTuningJobResponse(job=t.TuningJob(job_id="j1")))
    server.on("DeleteTuningJob", t.DeleteTuningJobResponse())
    assert run("dataset", "list").stdout.splitlines() == [
        "DATA SET  NAME        FORM  ROWS    CREATED",
        "ds-1      rows.jsonl  chat  12,345  -",
    ]
    assert "rows      12,345" in run("dataset", "show", "ds-1").stdout
    assert run("dataset", "delete", "ds-1").stdout == "deleted ds-1\n"
    assert run("tune", "delete", "j1", "--yes").stdout == "deleted j1\n"
    assert objects(run("tune", "delete", "j1", "--json")) == [{"job_id": "j1"}]
