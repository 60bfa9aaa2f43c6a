"""Checkpoints of a training run: all that a fresh process needs to go on as if nothing had happened.

    <folder>/step-00000050/tensors.safetensors   parameter/<name>, exp_avg/<name>, exp_avg_sq/<name>, rng/<device>
    <folder>/step-00000050/state.json            step, losses, counters, and the digest of the tensors

Each appears by a rename, so one that is there was finished; the digest finds what a disk did to it later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

from graftwork_server.tuning.files import remove, write_folder, write_json, write_tensors

KEPT = 2
"""Newest checkpoints that are kept, so that one damaged file does not cost the run."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Progressed(msgspec.Struct, kw_only=True):
    """How far a run is, beside its tensors."""

    step: int = 0
    """Optimizer steps done; the position in the data follows from it."""
    seen_tokens: int = 0
    train_ms: int = 0
    """Time spent training so far, in every process that took part."""
    recent_losses: list[float] = []
    """Of the last tenth of all steps."""
    validation_loss: float | None = None


class CheckpointMismatch(Exception):
    """A checkpoint is whole, but of another run: another base, strategy or set of parameters."""


class Checkpoints:
    """The checkpoints in one folder. `identity` says of what run they are; one of another is not taken up."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self._folder = folder
        self._identity = dict(identity)

    def save(
        self, progressed: Progressed, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Makes a checkpoint durable, then removes all but the newest two."""
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS if moment in state}
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()

        def fill(temporary: Path) -> None:
            path = temporary / "tensors.safetensors"
            write_tensors(path, {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}, {})
            document = {
                "identity": self._identity,
                "progressed": msgspec.to_builtins(progressed),
                "tensors_sha256": _sha256(path),
            }
            write_json(temporary / "state.json", document)

        write_folder(self._folder / f"step-{progressed.step:08}", fill)
        for old in self._newest_first()[KEPT:]:
            remove(old)

    def restore(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        note: Callable[[str], None],
    ) -> Progressed | None:
        """Puts the newest whole checkpoint into `parameters`, `optimizer` and the random generators; None: there is
        none. A damaged one is passed over and noted. Raises CheckpointMismatch."""
        for folder in self._newest_first():
            try:
                document, tensors = _read(folder)
                progressed = msgspec.convert(document["progressed"], Progressed)
            except Exception as error:  # whatever a damaged file makes the readers raise
                note(f"the checkpoint {folder.name} is damaged and not used: {type(error).__name__}: {error}")
                continue
            self._check(document, parameters, tensors)
            _put(parameters, optimizer, tensors, progressed.step)
            return progressed
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self._folder.glob("step-" + "[0-9]" * 8), reverse=True)

    def _check(
        self,
        document: Mapping[str, Any],
        parameters: Mapping[str, torch.nn.Parameter],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        for key, mine in self._identity.items():
            if document["identity"].get(key) != mine:
                raise CheckpointMismatch(f"its {key} is {document['identity'].get(key)}, this run's is {mine}")
        shapes = {f"parameter/{name}": parameter.shape for name, parameter in parameters.items()}
        saved = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("parameter/")}
        if shapes != saved:
            raise CheckpointMismatch("its trained parameters are others")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    document = json.loads((folder / "state.json").read_bytes())
    path = folder / "tensors.safetensors"
    if _sha256(path) != document["tensors_sha256"]:
        raise ValueError("its tensors are not those that were written")
    return document, load_file(path)


def _put(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    step: int,
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            if f"exp_avg/{name}" in tensors:
                state = {moment: tensors[f"{moment}/{name}"].to(parameter.device).clone() for moment in _MOMENTS}
                # The fused optimizer counts on the parameter's device.
                state["step"] = torch.tensor(float(step), device=parameter.device)
                optimizer.state[parameter] = state
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
