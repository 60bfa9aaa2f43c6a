"""The training loop, all of it: rows, forward, loss, backward, clip, step, report, evaluate, checkpoint.

Strategies bring the model, the loss and their defaults; everything else is here, the same for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from graftwork_plugins import Strategy, Trainable, TrainingConfig, TrainingRow
from graftwork_server.engine.attention.packed import packed_rows
from graftwork_server.errors import FailedPrecondition
from graftwork_server.messages import Checkpointed, Evaluated, Note, Progress, TunerEvent
from graftwork_server.plugin_host import guard
from graftwork_server.tuning.checkpoint import CheckpointMismatch, Checkpoints, Progressed
from graftwork_server.tuning.data.rows import loss_tokens
from graftwork_server.tuning.gate import Gate
from graftwork_server.tuning.reports import Reports
from graftwork_server.tuning.schedule import learning_rate, pack, rows_of_step, steps_per_epoch, total_steps
from graftwork_server.types import TuningProgress


@dataclass(frozen=True)
class Run:
    """What a run trains, on what, and whom it tells."""

    strategy: Strategy
    config: TrainingConfig
    trainable: Trainable
    device: torch.device
    rows: Sequence[TrainingRow]
    """To train on; each carries loss."""
    held_out: Sequence[TrainingRow]
    checkpoints: Checkpoints
    reports: Reports
    gate: Gate | None = None

    def send(self, event: TunerEvent) -> None:
        """Reports what has happened."""
        self.reports.send(event)


def train(run: Run) -> Progressed:
    """Trains to the end, from the last checkpoint if there is one.

    Raises FailedPrecondition: LOSS_NOT_FINITE, PLUGIN_FAILED, CHECKPOINT_MISMATCH.
    """
    config, parameters = run.config, list(run.trainable.parameters.values())
    steps = total_steps(config, len(run.rows))
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    state = _resumed(run, optimizer)
    clock = _Clock(state, steps)
    for step in range(state.step, steps):
        rows = [run.rows[index] for index in rows_of_step(config, len(run.rows), step)]
        rate = learning_rate(config, step, steps)
        loss = _accumulate_gradients(run, rows)  # mean per token that carries loss
        norm = _clip_gradients(parameters, config.max_grad_norm)
        _check_finite(step, loss, norm, rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        state.step = step + 1
        state.seen_tokens += sum(len(row.input_ids) for row in rows)
        state.recent_losses = [*state.recent_losses, loss][-math.ceil(steps / 10) :]
        run.send(Progress(progress=clock.progress(loss, rate)))
        if run.held_out and _evaluation_is_due(run, state.step, steps):
            state.validation_loss = evaluate(run)
            run.send(Evaluated(step=state.step, loss=state.validation_loss))
        if config.checkpoint_steps and state.step % config.checkpoint_steps == 0 and state.step < steps:
            clock.update()
            run.reports.keep(state.step)
            run.checkpoints.save(state, run.trainable.parameters, optimizer)
            run.send(Checkpointed(step=state.step))
    clock.update()
    return state


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss per token over the held-out rows."""
    total = 0.0
    with _evaluation_mode(run.trainable.model):
        for rows in _micro_batches(run.held_out, run.config.micro_batch_tokens):
            total += float(_loss(run, rows))
    return total / sum(loss_tokens(row) for row in run.held_out)


def _accumulate_gradients(run: Run, rows: Sequence[TrainingRow]) -> float:
    """Forward and backward of one optimizer step. The loss of every micro-batch is divided by the tokens of the whole
    step, so that the gradient does not depend on how the rows were packed."""
    carrying = sum(loss_tokens(row) for row in rows)
    total = torch.zeros((), device=run.device)
    for micro_rows in _micro_batches(rows, run.config.micro_batch_tokens):
        if run.gate is not None:
            run.gate.wait()
        total += _loss(run, micro_rows, scale=1 / carrying)
    return float(total)


def _loss(run: Run, rows: Sequence[TrainingRow], scale: float | None = None) -> torch.Tensor:
    """Sum of the rows' loss, detached; with `scale`, times it, and its gradients are added to the parameters'."""
    with guard(run.strategy.id, "collate"):
        batch = run.strategy.collate(rows, run.device)
    with packed_rows(batch.cu_seqlens):
        with guard(run.strategy.id, "loss"):
            loss = run.strategy.loss(run.trainable, batch)
        if scale is not None:
            loss = loss * scale
            loss.backward()
    return loss.detach()


def _micro_batches(rows: Sequence[TrainingRow], most_tokens: int) -> Iterator[list[TrainingRow]]:
    for positions in pack([len(row.input_ids) for row in rows], most_tokens):
        yield [rows[position] for position in positions]


def _clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
    """Scales the gradients down to `max_norm` (0: not) and returns the norm they had."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def _check_finite(step: int, loss: float, norm: float, rate: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    raise FailedPrecondition(
        f"the {what} is not finite at step {step + 1} (loss {loss}, gradient norm {norm}, learning rate {rate:.3g}); "
        "lower learning_rate, raise warmup_ratio, or look for broken rows",
        reason="LOSS_NOT_FINITE",
        metadata={"step": str(step + 1)},
    )


def _evaluation_is_due(run: Run, step: int, steps: int) -> bool:
    every = run.config.eval_steps or steps_per_epoch(run.config, len(run.rows))
    return step % every == 0 or step == steps


def _resumed(run: Run, optimizer: torch.optim.Optimizer) -> Progressed:
    try:
        state = run.checkpoints.restore(run.trainable.parameters, optimizer, lambda text: run.send(Note(text=text)))
    except CheckpointMismatch as error:
        raise FailedPrecondition(
            f"the job's checkpoint cannot be taken up: {error}; create the job anew", reason="CHECKPOINT_MISMATCH"
        ) from None
    if state is None:
        return Progressed()
    run.reports.go_on(state.step)
    run.send(Note(text=f"goes on from the checkpoint of step {state.step}"))
    return state


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off, then as it was in each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Clock:
    """Rates and times of this process's part of the run."""

    def __init__(self, state: Progressed, steps: int) -> None:
        self._state, self._steps = state, steps
        self._started = time.monotonic()
        self._before_ms, self._first_step, self._first_token = state.train_ms, state.step, state.seen_tokens

    def update(self) -> float:
        """Brings the state's train_ms up to now; returns the seconds since this process began to train."""
        seconds = time.monotonic() - self._started
        self._state.train_ms = self._before_ms + round(seconds * 1000)
        return seconds

    def progress(self, loss: float, rate: float) -> TuningProgress:
        """The report of the step just done."""
        state, seconds = self._state, max(self.update(), 1e-9)
        seconds_per_step = seconds / (state.step - self._first_step)
        return TuningProgress(
            step=state.step,
            total_steps=self._steps,
            loss=loss,
            learning_rate=rate,
            tokens_per_second=(state.seen_tokens - self._first_token) / seconds,
            eta_ms=round((self._steps - state.step) * seconds_per_step * 1000),
            seen_tokens=state.seen_tokens,
        )
