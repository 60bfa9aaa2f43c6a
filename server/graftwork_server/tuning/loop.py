"""The training loop, all of it: rows, forward, loss, backward, clip, step, report, evaluate, checkpoint.

Strategies bring the model, the loss and their defaults; everything else is here, the same for all of them.
"""

from __future__ import annotations

import math
import time
from collections import deque
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

_RATE_STEPS = 20
"""Steps over which rates are taken."""


@dataclass(frozen=True)
class Run:
    """What a run trains, on what, and who hears of it."""

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
    while state.step < steps and not _has_converged(config, state):
        step = state.step
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
            _measure(run, state)
        if config.checkpoint_steps and state.step % config.checkpoint_steps == 0 and state.step < steps:
            clock.update()
            run.reports.keep(state.step)
            run.checkpoints.save(state, run.trainable.parameters, optimizer)
            run.send(Checkpointed(step=state.step))
    clock.update()
    if state.step < steps:
        text = f"stopped after step {state.step} of {steps}: the held-out loss was lowest after step {state.best_step}"
        run.send(Note(text=text))
    state.published_step = state.step
    if config.published_weights == "best":
        _take_best(run, state)
    return state


def _measure(run: Run, state: Progressed) -> None:
    """Measures the held-out loss; weights with a new lowest one are made durable if they may be published."""
    loss = evaluate(run)
    state.validation_loss = loss
    state.measured_since_best += 1
    if loss < (math.inf if state.best_loss is None else state.best_loss):
        state.best_loss, state.best_step, state.measured_since_best = loss, state.step, 0
        if run.config.published_weights == "best":
            run.checkpoints.save_best(state, run.trainable.parameters)
    run.send(Evaluated(step=state.step, loss=loss))


def _has_converged(config: TrainingConfig, state: Progressed) -> bool:
    return 0 < config.early_stopping_patience <= state.measured_since_best


def _take_best(run: Run, state: Progressed) -> None:
    """Puts the weights with the lowest held-out loss in the place of the last ones."""
    if state.best_step in (0, state.step):
        return
    if not run.checkpoints.restore_best(state.best_step, run.trainable.parameters):
        run.send(Note(text=f"the weights of step {state.best_step}, the best, are damaged; the last are published"))
        return
    text = (
        f"the weights of step {state.best_step} are published: their held-out loss is {state.best_loss:.4f}, that of "
        f"the last ones {state.validation_loss:.4f}"
    )
    run.send(Note(text=text))
    state.published_step, state.validation_loss = state.best_step, state.best_loss


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss per token over the held-out rows."""
    total = 0.0
    with _evaluation_mode(run.trainable.model):
        for rows in _micro_batches(run.held_out, run.config.micro_batch_tokens):
            _yield_to_serving(run)
            total += float(_loss(run, rows))
    return total / sum(loss_tokens(row) for row in run.held_out)


def _accumulate_gradients(run: Run, rows: Sequence[TrainingRow]) -> float:
    """Forward and backward of one optimizer step. The loss of every micro-batch is divided by the tokens of the whole
    step, so that the gradient does not depend on how the rows were packed."""
    carrying = sum(loss_tokens(row) for row in rows)
    total = torch.zeros((), device=run.device)
    for micro_rows in _micro_batches(rows, run.config.micro_batch_tokens):
        _yield_to_serving(run)
        total += _loss(run, micro_rows, scale=1 / carrying)
    return float(total)


def _yield_to_serving(run: Run) -> None:
    if run.gate is not None:
        run.gate.wait()


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
        self._before_ms = state.train_ms
        self._marks = deque([(self._started, state.step, state.seen_tokens)], maxlen=_RATE_STEPS + 1)

    def update(self) -> float:
        """Brings the state's train_ms up to now, which is returned."""
        now = time.monotonic()
        self._state.train_ms = self._before_ms + round((now - self._started) * 1000)
        return now

    def progress(self, loss: float, rate: float) -> TuningProgress:
        """The report of the step just done. Its rates are of the last steps: the whole run's would hide that it has
        become slower or faster since."""
        state = self._state
        self._marks.append((self.update(), state.step, state.seen_tokens))
        (began, first_step, first_token), (ended, _, _) = self._marks[0], self._marks[-1]
        seconds = max(ended - began, 1e-9)
        seconds_per_step = seconds / (state.step - first_step)
        return TuningProgress(
            step=state.step,
            total_steps=self._steps,
            loss=loss,
            learning_rate=rate,
            tokens_per_second=(state.seen_tokens - first_token) / seconds,
            eta_ms=round((self._steps - state.step) * seconds_per_step * 1000),
            seen_tokens=state.seen_tokens,
        )
