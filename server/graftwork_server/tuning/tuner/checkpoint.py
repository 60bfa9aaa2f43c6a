"""Checkpoints of a training run: all that a fresh process needs to go on as if nothing had happened.

    <folder>/step-00000050/tensors.safetensors   parameter/<name>, exp_avg/<name>, exp_avg_sq/<name>, rng/<device>
    <folder>/step-00000050/state.json            step, losses, counters, and the digest of the tensors
    <folder>/best-00000040/...                   parameters alone: the best by held-out loss

Each appears by a rename, so one that is there was finished; the digest finds what a disk did to it later.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

from graftwork_server.durable import remove, sha256_of, write_folder, write_json
from graftwork_server.tuning.tuner.artifact import write_tensors

KEPT_CHECKPOINTS = 2
"""Newest checkpoints that are kept, so that one damaged file does not cost the run."""

_DIGITS = "[0-9]" * 8
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
    """The newest; at the end that of the published weights."""
    lowest_loss: float | None = None
    """The lowest held-out loss so far."""
    lowest_losses: list[float] = []
    """Of each group of held-out rows then."""
    best_loss: float | None = None
    """Held-out loss of the best weights: the last that were as good as the lowest loss."""
    best_step: int = 0
    """Step after which the weights were best; 0: the held-out loss was never measured."""
    measured_since_best: int = 0
    """Held-out losses since then."""
    published_step: int = 0


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
        """Makes a checkpoint durable, then removes what is no longer needed: see _tidy."""
        tensors = _parameter_tensors(parameters)
        for name, parameter in parameters.items():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS if moment in state}
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        self._write(_named("step", progressed.step), tensors, progressed)
        self._tidy(progressed)

    def save_best(self, progressed: Progressed, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Makes the parameters of `progressed.best_step` durable: a third of a checkpoint's bytes."""
        self._write(_named("best", progressed.best_step), _parameter_tensors(parameters), progressed)
        self._tidy(progressed)

    def restore_best(self, step: int, parameters: Mapping[str, torch.nn.Parameter]) -> bool:
        """Puts what save_best wrote for `step` into `parameters`; false if it is gone or damaged."""
        try:
            _, tensors = _read(self._folder / _named("best", step))
        except Exception:  # whatever a damaged file makes the readers raise
            return False
        _put_parameters(parameters, tensors)
        return True

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor], progressed: Progressed) -> None:
        def fill(temporary: Path) -> None:
            path = temporary / "tensors.safetensors"
            write_tensors(path, {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}, {})
            document = {
                "identity": self._identity,
                "progressed": msgspec.to_builtins(progressed),
                "tensors_sha256": sha256_of(path),
            }
            write_json(temporary / "state.json", document)

        write_folder(self._folder / name, fill)

    def _tidy(self, progressed: Progressed) -> None:
        """Removes all checkpoints but the newest two, and all best weights but those of `progressed` and of the
        checkpoints that are kept: a run that goes on from one of them has to find them again."""
        newest_first = self._newest_first()
        needed = {_named("best", progressed.best_step)}
        for folder in newest_first[:KEPT_CHECKPOINTS]:
            with contextlib.suppress(Exception):  # a damaged one is passed over when it is read
                document = json.loads((folder / "state.json").read_bytes())
                needed.add(_named("best", msgspec.convert(document["progressed"], Progressed).best_step))
        best = [folder for folder in self._folder.glob("best-" + _DIGITS) if folder.name not in needed]
        for old in [*newest_first[KEPT_CHECKPOINTS:], *best]:
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
        return sorted(self._folder.glob("step-" + _DIGITS), reverse=True)

    def _check(
        self,
        document: Mapping[str, Any],
        parameters: Mapping[str, torch.nn.Parameter],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        for key, expected in self._identity.items():
            if document["identity"].get(key) != expected:
                raise CheckpointMismatch(f"its {key} is {document['identity'].get(key)}, this run's is {expected}")
        shapes = {f"parameter/{name}": parameter.shape for name, parameter in parameters.items()}
        saved = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("parameter/")}
        if shapes != saved:
            raise CheckpointMismatch("its trained parameters are others")


def _named(kind: str, step: int) -> str:
    return f"{kind}-{step:08}"


def _parameter_tensors(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    document = json.loads((folder / "state.json").read_bytes())
    path = folder / "tensors.safetensors"
    if sha256_of(path) != document["tensors_sha256"]:
        raise ValueError("its tensors are not those that were written")
    return document, load_file(path)


def _put(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    step: int,
) -> None:
    _put_parameters(parameters, tensors)
    for name, parameter in parameters.items():
        if f"exp_avg/{name}" in tensors:
            state = {moment: tensors[f"{moment}/{name}"].to(parameter.device).clone() for moment in _MOMENTS}
            # The fused optimizer counts on the parameter's device.
            state["step"] = torch.tensor(float(step), device=parameter.device)
            optimizer.state[parameter] = state
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


@torch.no_grad()
def _put_parameters(parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter/{name}"])
