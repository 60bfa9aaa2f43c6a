"""Settings of a job that its request leaves open, chosen from the rows, the strategy and the base, each with a reason.

What the request sets is kept. What a strategy declares as a default of its own is kept, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graftwork_plugins import Automatic, BaseInfo, Choice, TrainingConfig
from graftwork_server.tuning.schedule import steps_per_epoch, total_steps
from graftwork_server.types import SettingChoice

FEWEST_STEPS, MOST_STEPS = 150, 1500
"""Fewer steps do not teach a small task; after more, another pass over rows seen before brings little."""
WARMUP_STEPS = 10
MEASUREMENTS = 15
"""Of held-out loss in a run."""
PATIENCE = 8
"""Half a run: the loss of ten rows goes up and down while the rate is high, and the best weights are kept anyway."""
HELD_OUT_FROM_ROWS = 50
"""With fewer rows, none can be spared for a measurement, which a handful would not make either."""
HELD_OUT_FRACTION, MOST_HELD_OUT = 0.1, 200

_STEPS = ("max_steps", "num_epochs")


def given_settings(config: Mapping[str, object]) -> list[SettingChoice]:
    """What a request sets itself, as choices."""
    return [
        SettingChoice(key=key, value=value, reason="set in the request", automatic=False)
        for key, value in config.items()
    ]


def choose_held_out(config: Mapping[str, object], row_count: int) -> Choice | None:
    """The fraction of rows to hold out where the request names none; None: no choice, since the request fixes the
    number of steps, and when to stop is what they would be held out for."""
    if any(key in config for key in _STEPS):
        return None
    if row_count < HELD_OUT_FROM_ROWS:
        return Choice(
            0.0, f"{row_count} rows are all needed to learn from; some are held out from {HELD_OUT_FROM_ROWS} on"
        )
    held_out = min(round(row_count * HELD_OUT_FRACTION), MOST_HELD_OUT)
    return Choice(
        held_out / row_count, f"{held_out} of {row_count} rows are held out to find when to stop and what to publish"
    )


def automatic_settings(
    settings: TrainingConfig, base: BaseInfo, row_count: int, held_out_rows: int
) -> Sequence[SettingChoice]:
    """Choices for what `settings` (made of the request alone) leaves open. `row_count`: rows that are trained on."""
    fields = type(settings).model_fields
    chosen = {
        key: mark.rule(settings, base)
        for key, field in fields.items()
        for mark in field.metadata
        if isinstance(mark, Automatic)
    }
    left_open = {key for key, field in TrainingConfig.model_fields.items() if fields[key].default == field.default}
    chosen |= _course(settings, left_open, row_count, held_out_rows)
    return [
        SettingChoice(key=key, value=choice.value, reason=choice.reason)
        for key, choice in chosen.items()
        if key not in settings.model_fields_set
    ]


def _course(settings: TrainingConfig, left_open: set[str], row_count: int, held_out_rows: int) -> dict[str, Choice]:
    """How long, how the rate begins, how often to measure, when to stop, what to publish."""
    choices: dict[str, Choice] = {}
    fixed = settings.model_fields_set
    if not fixed.intersection(_STEPS) and left_open.issuperset(_STEPS):
        choices["max_steps"] = _steps(settings, row_count)
    steps = choices["max_steps"].value if "max_steps" in choices else total_steps(settings, row_count)
    choices["warmup_ratio"] = _warmup(steps)
    if held_out_rows:
        choices["published_weights"] = Choice("best", "the held-out loss tells which of the measured weights are best")
        if not fixed.intersection(_STEPS):
            every = _steps_between(settings.batch_size, steps, held_out_rows)
            choices["eval_steps"] = Choice(
                every,
                f"{math.ceil(steps / every)} measurements of {held_out_rows} held-out rows, in a sixth of the time at "
                "most",
            )
            choices["early_stopping_patience"] = Choice(
                PATIENCE,
                f"{PATIENCE} measurements in a row above the lowest by more than chance explains: the loss rises",
            )
    return {key: choice for key, choice in choices.items() if key in left_open}


def _steps(settings: TrainingConfig, row_count: int) -> Choice:
    epoch = steps_per_epoch(settings, row_count)
    wanted = math.ceil(settings.num_epochs * epoch)
    passes = f"{settings.num_epochs:g} passes over {row_count} rows are {wanted} steps"
    if wanted < FEWEST_STEPS:
        return Choice(FEWEST_STEPS, f"{passes}; fewer than {FEWEST_STEPS} do not teach a task")
    most = max(MOST_STEPS, epoch)
    if wanted > most:
        return Choice(most, f"{passes}; at most {MOST_STEPS} or one pass, whichever is more, is done unasked")
    return Choice(wanted, passes)


def _warmup(steps: int) -> Choice:
    ratio = min(0.1, max(0.03, WARMUP_STEPS / steps))
    return Choice(
        float(f"{ratio:.3g}"),
        f"{math.ceil(ratio * steps)} of {steps} steps: AdamW's first steps rest on few gradients",
    )


def _steps_between(batch_size: int, steps: int, held_out_rows: int) -> int:
    """Steps from one measurement to the next. A forward alone takes a third of a training step."""
    measurement = held_out_rows / batch_size / 3
    return min(steps, max(math.ceil(steps / MEASUREMENTS), math.ceil(5 * measurement)))
