"""A real tuner process over a toy model: it learns, yields, resumes bit by bit, and fails in plain words."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.server.tuning.tuner_harness import TunerHarness, checkpointed, jsonl, losses
from transformers import AutoModelForCausalLM

from graftwork_server.messages import Evaluated, Failed, Finished, Note, Progress


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> TunerHarness:
    """One base model for all tests."""
    return TunerHarness(tmp_path_factory.mktemp("tuner"))


def final_tensors(job_dir: str, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(Path(job_dir) / "artifact" / name)


def test_a_lora_job_learns_and_leaves_a_peft_adapter(harness: TunerHarness) -> None:
    job = harness.job("lora", rows=28, max_steps=40, validation_fraction=0.25, eval_steps=20, checkpoint_steps=25)
    events = harness.run(job)
    finished = events[-1]
    assert isinstance(finished, Finished), finished
    steps = [event.progress for event in events if isinstance(event, Progress)]
    assert [progress.step for progress in steps] == list(range(1, 41))
    assert steps[-1].loss < 0.2 * steps[0].loss
    assert steps[0].learning_rate == pytest.approx(0.005)  # half way up a warm-up of two steps
    assert steps[-1].learning_rate == pytest.approx(0.01 / 38)
    assert steps[-1].eta_ms == 0
    assert all(progress.total_steps == 40 and progress.tokens_per_second > 0 for progress in steps)
    assert checkpointed(events) == [25]
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert [event.step for event in evaluated] == [20, 40]

    result = finished.result
    assert result.validation_loss == evaluated[-1].loss
    assert result.validation_loss < 0.5
    assert result.final_loss == pytest.approx(sum(losses(events)[-4:]) / 4)
    artifact = Path(job.artifact_dir)
    assert sorted(entry.name for entry in artifact.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert result.artifact_bytes == sum(entry.stat().st_size for entry in artifact.iterdir())
    assert result.trained_parameters == sum(t.numel() for t in final_tensors(job.job_dir).values())
    assert result.peak_memory_bytes > 50 * 2**20
    assert not Path(job.artifact_dir + ".tmp").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(harness.model_dir), artifact)


def test_a_full_job_leaves_a_checkpoint_and_the_shared_weights_alone(harness: TunerHarness) -> None:
    before = harness.weights.block.clone()
    job = harness.job("full", strategy="full", learning_rate=0.003, max_steps=20)
    events = harness.run(job)
    assert isinstance(events[-1], Finished), events[-1]
    assert losses(events)[-1] < 0.5 * losses(events)[0]
    assert torch.equal(harness.weights.block, before)
    model = AutoModelForCausalLM.from_pretrained(job.artifact_dir)
    assert events[-1].result.trained_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("strategy", "file"), [("lora", "adapter_model.safetensors"), ("full", "model.safetensors")])
def test_a_killed_job_resumes_bit_by_bit(harness: TunerHarness, strategy: str, file: str) -> None:
    settings = {"strategy": strategy, "max_steps": 14, "checkpoint_steps": 5, "validation_fraction": 0.2}
    if strategy == "lora":
        settings["lora_dropout"] = 0.1  # so that the random state matters
    unbroken = harness.job(f"unbroken-{strategy}", **settings)
    whole = harness.run(unbroken)

    job = harness.job(f"killed-{strategy}", **settings)
    tuner = harness.start(job)
    first = tuner.events_until(Progress)
    while losses(first) == [] or len(losses(first)) < 12:
        first += tuner.events_until(Progress)
    tuner.kill()
    assert not Path(job.artifact_dir).exists()
    second = harness.run(job)

    assert any(isinstance(event, Note) and "step 10" in event.text for event in second)
    assert losses(first)[:12] == losses(whole)[:12]
    assert losses(second) == losses(whole)[10:]
    mine, theirs = final_tensors(job.job_dir, file), final_tensors(unbroken.job_dir, file)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert second[-1].result.final_loss == whole[-1].result.final_loss  # type: ignore[union-attr]
    assert second[-1].result.validation_loss == whole[-1].result.validation_loss  # type: ignore[union-attr]


def test_a_job_that_had_ended_is_not_trained_again(harness: TunerHarness) -> None:
    job = harness.job("twice", max_steps=2)
    first, second = harness.run(job), harness.run(job)
    assert losses(second) == []
    assert second[-1] == first[-1]


def test_the_tuner_ends_with_the_engine(harness: TunerHarness) -> None:
    tuner = harness.start(harness.job("orphan", max_steps=100_000))
    tuner.events_until(Progress)
    tuner.connection.close()
    assert tuner.process.wait(10) == 1


def test_training_gives_way_but_does_not_starve(harness: TunerHarness) -> None:
    os.pwrite(harness.gate, struct.pack("=q", 3), 0)
    try:
        tuner = harness.start(harness.job("gated", max_steps=4), yield_ms=150)
        tuner.events_until(Progress)
        started = time.monotonic()
        events = tuner.events_until(Finished)
        assert time.monotonic() - started >= 3 * 0.15
        assert isinstance(events[-1], Finished)
    finally:
        os.pwrite(harness.gate, struct.pack("=q", 0), 0)
        tuner.close()


def failure(harness: TunerHarness, **settings: object) -> Failed:
    job = harness.job(f"bad-{abs(hash(str(settings)))}", **settings)  # type: ignore[arg-type]
    failed = harness.run(job)[-1]
    assert isinstance(failed, Failed)
    assert not Path(job.artifact_dir).exists()
    return failed


def test_a_loss_that_is_not_finite_fails_with_the_step(harness: TunerHarness) -> None:
    failed = failure(harness, strategy="full", learning_rate=10, max_grad_norm=0, warmup_ratio=0, max_steps=200)
    assert failed.error.reason == "LOSS_NOT_FINITE"
    assert "at step" in failed.error.message
    assert "lower learning_rate" in failed.error.message


def test_a_set_without_loss_fails(harness: TunerHarness) -> None:
    assert failure(harness, max_sequence_tokens=3).error.reason == "DATASET_WITHOUT_LOSS"


def test_a_bad_setting_fails_by_name(harness: TunerHarness) -> None:
    failed = failure(harness, rank=3)
    assert failed.error.violations[0].field == "spec.config.rank"


def test_rows_without_loss_are_left_out_and_noted(harness: TunerHarness, tmp_path: Path) -> None:
    data = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "a" * 200, "completion": "b"}, *[{"prompt": "a", "completion": "b"}] * 3]
    data.write_bytes(b"".join(jsonl(rows)))
    events = harness.run(harness.job("mixed", dataset_path=str(data), max_steps=1))
    assert any(isinstance(event, Note) and event.text.startswith("1 rows carry no loss") for event in events)
    assert isinstance(events[-1], Finished)


def test_nothing_in_the_job_directory_is_pickled(harness: TunerHarness) -> None:
    job = harness.job("files", max_steps=4, checkpoint_steps=2)
    harness.run(job)
    files = [path for path in Path(job.job_dir).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
