"""The training loop, all of it: rows, forward, loss, backward, clip, step, report, evaluate, checkpoint.

Strategies bring the model, the loss and their defaults; everything else is here, the same for all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from graftwork_plugins import Strategy, Trainable, TrainingConfig, TrainingRow
from graftwork_server.errors import FailedPrecondition
from graftwork_server.kernels.attention.packed import packed_rows
from graftwork_server.tuning.data.rows import loss_tokens
from graftwork_server.tuning.plugin_host import guard
from graftwork_server.tuning.schedule import learning_rate, pack, rows_of_step, steps_per_epoch, total_steps
from graftwork_server.tuning.tuner.checkpoint import CheckpointMismatch, Checkpoints, Progressed
from graftwork_server.tuning.tuner.gate import Gate
from graftwork_server.tuning.tuner.reports import Reports
from graftwork_server.types import TuningProgress
from graftwork_server.wire.tuning import Checkpointed, Evaluated, Note, Progress, TunerEvent

_GROUPS = 16
"""Groups of held-out rows at least: how much they differ says how far a mean can be trusted."""
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
        text = f"stopped after step {state.step} of {steps}: since step {state.best_step} the held-out loss has risen"
        run.send(Note(text=text))
    state.published_step = state.step
    if config.published_weights == "best":
        _take_best(run, state)
    return state


def _measure(run: Run, state: Progressed) -> None:
    """Measures the held-out loss. Weights are the best so far if their loss is the lowest, or above it by less than
    chance explains; those are made durable if they may be published."""
    measured = evaluate(run)
    loss = measured.loss
    state.validation_loss = loss if math.isfinite(loss) else None
    state.measured_since_best += 1
    lowest = loss < (math.inf if state.lowest_loss is None else state.lowest_loss)
    if lowest or measured.as_good_as(state.lowest_losses):
        if lowest:
            state.lowest_loss, state.lowest_losses = loss, measured.losses
        state.best_loss, state.best_step, state.measured_since_best = loss, state.step, 0
        if run.config.published_weights == "best":
            run.checkpoints.save_best(state, run.trainable.parameters)
    run.send(Evaluated(step=state.step, loss=loss))


def _has_converged(config: TrainingConfig, state: Progressed) -> bool:
    return 0 < config.early_stopping_patience <= state.measured_since_best


def _take_best(run: Run, state: Progressed) -> None:
    """Puts the best weights in the place of the last ones."""
    if state.best_step in (0, state.step):
        return
    if not run.checkpoints.restore_best(state.best_step, run.trainable.parameters):
        run.send(Note(text=f"the weights of step {state.best_step}, the best, are damaged; the last are published"))
        return
    text = (
        f"the weights of step {state.best_step} are published: their held-out loss is {_shown(state.best_loss)}, that "
        f"of the last ones {_shown(state.validation_loss)}"
    )
    run.send(Note(text=text))
    state.published_step, state.validation_loss = state.best_step, state.best_loss


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


@dataclass(frozen=True)
class Measurement:
    """The loss over the held-out rows: `losses` are sums over groups of rows, the same groups each time."""

    losses: list[float]
    tokens: int
    """That carry loss, in all groups."""

    @property
    def loss(self) -> float:
        """Mean per token."""
        return sum(self.losses) / self.tokens

    def as_good_as(self, lowest: Sequence[float]) -> bool:
        """Whether these losses are above the `lowest` ones by no more than twice the standard error of the difference,
        group by group. Of ten rows, one that is answered with confidence and wrong raises the mean, while nine get
        better: the smallest mean alone would then take weights that have hardly learned (Breiman's one-standard-error
        rule, for what is trained longer instead of what is simpler)."""
        if len(lowest) != len(self.losses) or len(lowest) < 2 or not math.isfinite(self.loss):
            return False
        differences = [mine - its for mine, its in zip(self.losses, lowest, strict=True)]
        return sum(differences) <= 2 * statistics.stdev(differences) * math.sqrt(len(differences))


@torch.no_grad()
def evaluate(run: Run) -> Measurement:
    """Loss over the held-out rows, in at least 16 groups where there are as many rows."""
    losses = []
    size = max(1, len(run.held_out) // _GROUPS)
    with _evaluation_mode(run.trainable.model):
        for start in range(0, len(run.held_out), size):
            total = 0.0
            for rows in _micro_batches(run.held_out[start : start + size], run.config.micro_batch_tokens):
                _yield_to_serving(run)
                total += float(_loss(run, rows))
            losses.append(total)
    return Measurement(losses, sum(loss_tokens(row) for row in run.held_out))


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
