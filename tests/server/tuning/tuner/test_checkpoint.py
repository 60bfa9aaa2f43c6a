"""Checkpoints: whole or not taken up, and never of another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graftwork_server.tuning.tuner.checkpoint import CheckpointMismatch, Checkpoints, Progressed

IDENTITY = {"base": "sha256:a", "strategy": "lora 1.0"}


def trained(steps: int, seed: int = 0) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Two parameters after some AdamW steps."""
    torch.manual_seed(seed)
    parameters = {name: torch.nn.Parameter(torch.randn(3, 2)) for name in ("a", "b")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    for _ in range(steps):
        advance(parameters, optimizer)
    return parameters, optimizer


def advance(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    loss = sum((parameter * torch.randn(3, 2)).square().sum() for parameter in parameters.values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, IDENTITY)
    for step in steps:
        checkpoints.save(Progressed(step=step, seen_tokens=step * 10, recent_losses=[0.5]), *trained(step))
    return checkpoints


def test_a_restored_run_goes_on_as_if_unbroken(tmp_path: Path) -> None:
    parameters, optimizer = trained(3)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(Progressed(step=3, recent_losses=[0.25], validation_loss=1.5, train_ms=7), parameters, optimizer)
    advance(parameters, optimizer)

    again, optimizer_again = trained(0, seed=99)
    torch.manual_seed(12345)
    state = checkpoints.restore(again, optimizer_again, pytest.fail)
    assert state == Progressed(step=3, recent_losses=[0.25], validation_loss=1.5, train_ms=7)
    advance(again, optimizer_again)
    assert all(torch.equal(again[name], parameters[name]) for name in again)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_without_a_checkpoint_a_run_is_fresh(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", IDENTITY).restore(*trained(0), pytest.fail) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "no state", "no tensors", "no JSON", "a key missing"])
def test_a_damaged_checkpoint_is_passed_over_and_noted(tmp_path: Path, damage: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002"
    tensors, state = newest / "tensors.safetensors", newest / "state.json"
    content = bytearray(tensors.read_bytes())
    if damage == "cut":
        tensors.write_bytes(content[:-8])
    elif damage == "flipped":
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "no state":
        state.unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no JSON":
        state.write_text("{")
    else:
        document = json.loads(state.read_text())
        del document["progressed"]
        state.write_text(json.dumps(document))
    notes: list[str] = []
    restored = checkpoints.restore(*trained(0), notes.append)
    assert restored is not None
    assert restored.step == 1
    assert len(notes) == 1
    assert "step-00000002 is damaged" in notes[0]


def test_what_was_being_written_is_not_seen(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.tmp")
    restored = checkpoints.restore(*trained(0), pytest.fail)
    assert restored is not None
    assert restored.step == 1


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    other = Checkpoints(tmp_path, {**IDENTITY, "base": "sha256:b"})
    with pytest.raises(CheckpointMismatch, match="base"):
        other.restore(*trained(0), pytest.fail)
    parameters, optimizer = trained(0)
    with pytest.raises(CheckpointMismatch, match="parameters"):
        saved(tmp_path, 1).restore({"a": parameters["a"]}, optimizer, pytest.fail)
