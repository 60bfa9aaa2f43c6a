"""A data file becomes an adapter that answers by name and that plain PEFT and transformers can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.reference import Reference
from tests.e2e.rows import prompt_rows
from tests.e2e.serving import Server, run_cli

from graftwork import Client, InvalidArgumentError

TEXT = "one two three > three two one"


def assert_served_as(reference: Reference, client: Client, name: str) -> None:
    """The server's scores of the adapter must be the reference's, and not the base's."""
    ids = client.tokenize(TEXT).token_ids
    scored = client.score(name, ids)
    reference.assert_scored(ids, [token.logprob for token in scored.tokens])
    assert abs(scored.total_logprob - client.score("base", ids).total_logprob) > 1e-3


def test_a_lora_job_through_the_client(client: Client, server: Server, model_dir: Path) -> None:
    dataset = client.datasets.upload(prompt_rows(32))
    assert (dataset.format, dataset.row_count) == ("prompt_completion", 32)
    job = client.tuning.create(
        strategy="lora",
        dataset=dataset,
        validation=client.datasets.upload(prompt_rows(8, start=40)),
        adapter="tuned-lora",
        config={
            "r": 4,
            "max_steps": 16,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "eval_steps": 8,
            "checkpoint_steps": 4,
        },
        load=True,
    )
    assert job.info.estimate is not None
    assert job.info.estimate.total_steps == 16
    events = list(job.events(timeout=280))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))

    progress = [event.progress for event in events if event.progress is not None]
    assert [report.step for report in progress] == list(range(1, 17))
    assert all(report.total_steps == 16 and report.learning_rate > 0 for report in progress)
    assert all(report.tokens_per_second > 0 and report.eta_ms >= 0 for report in progress)
    assert progress[-1].loss < progress[0].loss
    assert progress[-1].seen_tokens > progress[0].seen_tokens > 0
    evaluations = [event.evaluation for event in events if event.evaluation is not None]
    assert [report.step for report in evaluations] == [8, 16]
    assert evaluations[1].loss < evaluations[0].loss
    assert [event.checkpoint_step for event in events if event.kind == "checkpoint"] == [4, 8, 12]
    assert [event.state for event in events if event.kind == "state"] == ["pending", "running", "succeeded"]

    result = job.wait()
    assert result.adapter_version == "adapters/tuned-lora/versions/1"
    assert result.validation_loss == pytest.approx(evaluations[-1].loss)
    adapter = client.adapters.get("tuned-lora")
    assert (adapter.strategy, adapter.rank, adapter.tuning_job, adapter.loaded) == ("lora", 4, job.info.name, True)
    assert_served_as(Reference(model_dir, server.artifact(adapter.digest)), client, "tuned-lora")
    # A second watcher sees the same, from wherever it begins.
    again = list(client.tuning.get(job.id).events(after_sequence=10))
    assert again == events[10:]


def test_a_full_job_through_the_command_line(client: Client, server: Server, tmp_path: Path) -> None:
    data, held_out = tmp_path / "rows.jsonl", tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(16)))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(4, start=60)))
    options = ["--strategy", "full", "--data", str(data), "--validation", str(held_out), "--adapter", "tuned-full"]
    settings = ["--set", "max_steps=6", "--set", "batch_size=8", "--set", "learning_rate=0.002"]
    done = run_cli("tune", "create", *options, *settings, "--follow", "--json", address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    *events, job = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["progress"]["step"] for event in events if event["kind"] == "progress"] == [1, 2, 3, 4, 5, 6]
    assert job["state"] == "succeeded"
    assert job["result"]["validation_loss"] > 0

    adapter = client.adapters.get("tuned-full")
    assert (adapter.strategy, adapter.version, adapter.loaded) == ("full", 1, False)
    assert_served_as(Reference(server.artifact(adapter.digest)), client, "tuned-full")
    shown = run_cli("generate", "tuned-full", "one two", "--max-tokens", "3", "--json", address=server.address)
    assert json.loads(shown.stdout)["model"] == "tuned-full"


def test_what_a_job_leaves_open_is_chosen_and_said(
    client: Client, server: Server, model_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(60)))
    # Few rows a step, so that the toy's 150 steps take seconds.
    options = ["--strategy", "lora", "--data", str(data), "--adapter", "tuned-open", "--set", "batch_size=2"]
    done = run_cli("tune", "create", *options, "--follow", "--json", address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    *events, job = [json.loads(line) for line in done.stdout.splitlines()]
    chosen = {choice["key"]: choice["value"] for choice in job["choices"] if choice["automatic"]}
    assert chosen.keys() == {
        "validation_fraction",
        "learning_rate",
        "max_steps",
        "warmup_ratio",
        "eval_steps",
        "early_stopping_patience",
        "published_weights",
    }
    assert [(choice["key"], choice["value"]) for choice in job["choices"] if not choice["automatic"]] == [
        ("batch_size", 2)
    ]
    assert all(choice["reason"] for choice in job["choices"])
    assert (chosen["validation_fraction"], chosen["max_steps"]) == (0.1, 150)
    assert {key: job["spec"]["config"][key] for key in chosen if key != "validation_fraction"} == {
        key: value for key, value in chosen.items() if key != "validation_fraction"
    }
    steps = [event["progress"]["step"] for event in events if event["kind"] == "progress"]
    measured = {e["evaluation"]["step"]: e["evaluation"]["loss"] for e in events if e["kind"] == "evaluation"}
    assert list(measured) == list(range(10, len(steps) + 1, 10))
    best = min(measured, key=lambda step: (measured[step], step))
    assert len(steps) == min(150, best + 80)
    result = job["result"]
    assert (result["published_step"], result["validation_loss"]) == (best, pytest.approx(measured[best]))
    artifact = server.artifact(client.adapters.get("tuned-open").digest)
    assert_served_as(Reference(model_dir, artifact), client, "tuned-open")
    shown = run_cli("tune", "show", job["job_id"], address=server.address).stdout
    assert "max_steps=150: 3 passes over 54 rows are 81 steps; fewer than 150 do not teach a task" in shown


GOOD = '{"prompt": "a", "completion": "b"}'
BAD_LINES = [GOOD, "{", '{"prompt": "a"}', GOOD, '{"prompt": 1, "completion": "b"}', "[]", "null", GOOD, '"x"']


def test_bad_lines_are_reported_with_their_numbers(client: Client, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(BAD_LINES) + "\n")
    report = client.datasets.validate(file)
    assert not report.valid
    assert [error.line for error in report.errors] == [2, 3, 5, 6, 7, 9]
    assert all(error.reason for error in report.errors)
    with pytest.raises(InvalidArgumentError) as caught:
        client.datasets.upload(file)
    assert [violation.field for violation in caught.value.field_violations] == [f"line {n}" for n in (2, 3, 5, 6, 7, 9)]
    checked = run_cli("dataset", "check", str(file), address=server.address)
    assert checked.returncode == 1
    assert [f"{file}:{line}:" in checked.stdout for line in range(1, 10)] == [
        n in (2, 3, 5, 6, 7, 9) for n in range(1, 10)
    ]
    many = client.datasets.validate(b"nonsense\n" * 300)
    assert (len(many.errors), many.error_count) == (100, 300)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"config": {"max_sequence_tokens": 4}}, "spec.dataset"),
        ({"config": {"learning_rat": 1.0}}, "spec.config.learning_rat"),
        ({"config": {"target_modules": ["z_proj"]}}, "spec.config.target_modules"),
        ({"config": {"r": 0}}, "spec.config.r"),
        ({"dataset": "ds-00000000000000000000000000000000"}, "spec.dataset"),
        ({"strategy": "witchcraft"}, "spec.strategy"),
        ({"adapter": "../x"}, "spec.adapter_id"),
        ({"validation_fraction": 0.9}, "spec.validation_fraction"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_it(client: Client, changes: dict[str, Any], field: str) -> None:
    dataset = client.datasets.upload(prompt_rows(8))
    with pytest.raises(Exception) as caught:
        client.tuning.create(**{"strategy": "lora", "dataset": dataset, "adapter": "never", **changes})
    assert any(violation.field.startswith(field) for violation in caught.value.field_violations), caught.value
    if "max_sequence_tokens" in str(changes):
        assert caught.value.reason == "DATASET_NO_LOSS"
        assert "line 0" not in str(caught.value)
        assert [violation.field for violation in caught.value.field_violations] == ["spec.dataset"]
    assert all(job.info.spec.adapter_id != "never" for job in client.tuning.list())
