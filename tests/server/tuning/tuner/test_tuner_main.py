"""A real tuner process over a toy model: it learns, yields, resumes bit by bit, and fails in plain words."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.server.tuning.tuner.tuner_harness import TunerHarness, checkpointed, jsonl, losses
from transformers import AutoModelForCausalLM

from graftwork_plugins.builtin.strategies.lora import Lora
from graftwork_server.wire.tuning import Evaluated, Failed, Finished, Note, Progress, TunerEvent, TunerTask


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> TunerHarness:
    """One base model for all tests."""
    return TunerHarness(tmp_path_factory.mktemp("tuner"))


SETTINGS: dict[str, Any] = {
    "rows": 28,
    "max_steps": 24,
    "validation_fraction": 0.25,
    "eval_steps": 12,
    "checkpoint_steps": 10,
    "lora_dropout": 0.1,  # so that the random state matters
}


@pytest.fixture(scope="module")
def unbroken(harness: TunerHarness) -> tuple[TunerTask, list[TunerEvent]]:
    """A lora job from beginning to end, in its own process."""
    job = harness.job("unbroken", **SETTINGS)
    return job, harness.run(job)


def test_a_lora_job_learns_and_leaves_a_peft_adapter(
    harness: TunerHarness, unbroken: tuple[TunerTask, list[TunerEvent]]
) -> None:
    job, events = unbroken
    finished = events[-1]
    assert isinstance(finished, Finished), finished
    steps = [event.progress for event in events if isinstance(event, Progress)]
    assert [progress.step for progress in steps] == list(range(1, 25))
    assert steps[-1].loss < 0.3 * steps[0].loss
    assert steps[0].learning_rate == pytest.approx(0.01)  # the warm-up is one step
    assert steps[-1].learning_rate == pytest.approx(0.01 / 23)
    assert steps[-1].eta_ms == 0
    assert all(progress.total_steps == 24 and progress.tokens_per_second > 0 for progress in steps)
    assert checkpointed(events) == [10, 20]
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert [event.step for event in evaluated] == [12, 24]

    result = finished.result
    assert result.validation_loss == evaluated[-1].loss
    assert result.validation_loss < 1
    assert result.final_loss == pytest.approx(sum(losses(events)[-3:]) / 3)
    artifact = Path(job.artifact_dir)
    assert sorted(entry.name for entry in artifact.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert result.artifact_bytes == sum(entry.stat().st_size for entry in artifact.iterdir())
    tensors = load_file(artifact / "adapter_model.safetensors")
    assert result.trained_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert result.peak_memory_bytes > 50 * 2**20
    assert not Path(job.artifact_dir + ".tmp").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(harness.model_dir), artifact)


def test_nothing_in_the_job_directory_is_pickled(unbroken: tuple[TunerTask, list[TunerEvent]]) -> None:
    files = [path for path in Path(unbroken[0].job_dir).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_a_killed_job_resumes_bit_by_bit(harness: TunerHarness, unbroken: tuple[TunerTask, list[TunerEvent]]) -> None:
    whole = unbroken[1]
    job = harness.job("killed", **SETTINGS)
    tuner = harness.start(job)
    first: list[TunerEvent] = []
    while len(losses(first)) < 17:
        first += tuner.events_until(Progress)
    tuner.kill()
    assert not Path(job.artifact_dir).exists()
    second = harness.run(job)

    assert any(isinstance(event, Note) and "step 10" in event.text for event in second)
    assert losses(first)[:17] == losses(whole)[:17]
    assert losses(second) == losses(whole)[10:]
    mine, theirs = (load_file(Path(of.artifact_dir) / "adapter_model.safetensors") for of in (job, unbroken[0]))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    ends = [events[-1] for events in (second, whole)]
    assert all(isinstance(end, Finished) for end in ends)
    assert ends[0].result.final_loss == ends[1].result.final_loss  # type: ignore[union-attr]
    assert ends[0].result.validation_loss == ends[1].result.validation_loss  # type: ignore[union-attr]


def test_a_job_that_had_ended_is_not_trained_again(
    harness: TunerHarness, unbroken: tuple[TunerTask, list[TunerEvent]]
) -> None:
    events = harness.run_here(unbroken[0])
    assert losses(events) == []
    assert events[-1] == unbroken[1][-1]


def test_training_gives_way_and_ends_with_the_engine(harness: TunerHarness) -> None:
    tuner = harness.start(harness.job("gated", max_steps=100_000), yield_ms=60_000)
    tuner.events_until(Progress)
    os.pwrite(harness.gate, struct.pack("=q", 3), 0)
    try:
        tuner.connection.settimeout(1)
        with pytest.raises(TimeoutError):  # noqa: PT012 - it says something until it waits
            while True:
                tuner.events_until(Progress)
        # While it waits it has nothing to say, so only its watchdog can notice.
        tuner.connection.close()
        assert tuner.process.wait(10) == 1
    finally:
        os.pwrite(harness.gate, struct.pack("=q", 0), 0)


def test_a_full_job_leaves_a_checkpoint_and_the_shared_weights_alone(harness: TunerHarness) -> None:
    before = harness.weights.block.clone()
    job = harness.job("full", strategy="full", learning_rate=0.003, max_steps=20)
    events = harness.run_here(job)
    assert isinstance(events[-1], Finished), events[-1]
    assert losses(events)[-1] < 0.5 * losses(events)[0]
    assert torch.equal(harness.weights.block, before)
    model = AutoModelForCausalLM.from_pretrained(job.artifact_dir)
    assert events[-1].result.trained_parameters == sum(parameter.numel() for parameter in model.parameters())


def failure(harness: TunerHarness, **settings: Any) -> Failed:
    job = harness.job(f"bad-{len(list(harness.folder.iterdir()))}", **settings)
    failed = harness.run_here(job)[-1]
    assert isinstance(failed, Failed)
    assert not Path(job.artifact_dir).exists()
    return failed


def test_a_loss_that_is_not_finite_fails_with_the_step(harness: TunerHarness) -> None:
    # Weights times -9 each step.
    failed = failure(harness, strategy="full", learning_rate=10, weight_decay=1, max_steps=200)
    assert failed.error.reason == "LOSS_NOT_FINITE"
    assert "at step" in failed.error.message
    assert "lower learning_rate" in failed.error.message


def test_a_set_without_loss_fails(harness: TunerHarness) -> None:
    assert failure(harness, max_sequence_tokens=3).error.reason == "DATASET_NO_LOSS"


def test_a_bad_setting_fails_by_name(harness: TunerHarness) -> None:
    failed = failure(harness, rank=3)
    assert failed.error.violations[0].field == "spec.config.rank"


@pytest.mark.parametrize(
    ("raised", "reason", "advice"),
    [
        (MemoryError(), "OUT_OF_MEMORY", "micro_batch_tokens"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "OUT_OF_MEMORY", "micro_batch_tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "OUT_OF_MEMORY", "micro_batch_tokens"),
        (OSError(errno.ENOSPC, "No space left on device"), "PLUGIN_FAILED", "No space left"),
        (SystemExit(3), "PLUGIN_FAILED", "plugin 'lora' failed in loss: SystemExit: 3"),
        (KeyError("x"), "PLUGIN_FAILED", "plugin 'lora' failed in loss: KeyError"),
    ],
)
def test_what_is_raised_while_training_is_explained(
    harness: TunerHarness, monkeypatch: pytest.MonkeyPatch, raised: BaseException, reason: str, advice: str
) -> None:
    def loss(*arguments: Any) -> Any:
        raise raised

    monkeypatch.setattr(Lora, "loss", loss)
    failed = failure(harness)
    assert failed.error.reason == reason
    assert advice in failed.error.message


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        safetensors.SafetensorError(
            f"Error while serializing: I/O error: Disk quota exceeded (os error {errno.EDQUOT})"
        ),
    ],
    ids=str,
)
def test_a_full_disk_is_explained(
    harness: TunerHarness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, raised: Exception
) -> None:
    """And no defect: the log says it without a traceback."""

    def save_file(*arguments: Any, **named: Any) -> None:
        raise raised

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    assert failure(harness, max_steps=1).error.reason == "DISK_FULL"
    assert "the disk is full" in caplog.text
    assert not any(record.exc_info for record in caplog.records)


def test_rows_without_loss_are_left_out_and_noted(harness: TunerHarness, tmp_path: Path) -> None:
    data = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "a" * 200, "completion": "b"}, *[{"prompt": "a", "completion": "b"}] * 3]
    data.write_bytes(b"".join(jsonl(rows)))
    events = harness.run_here(harness.job("mixed", dataset_path=str(data), max_steps=1))
    assert any(isinstance(event, Note) and event.text.startswith("1 rows carry no loss") for event in events)
    assert isinstance(events[-1], Finished)
    assert events[0] == Note(text="1 rows carry no loss within 128 tokens and are left out")
