"""Settings that a job leaves open: what is chosen, and that nothing set by anybody is overruled."""

from __future__ import annotations

import math
from typing import Annotated, Any

import pytest
from pydantic import Field

from graftwork_plugins import Automatic, BaseInfo, Choice, TrainingConfig
from graftwork_plugins.builtin.strategies.full import FullConfig
from graftwork_plugins.builtin.strategies.ia3 import Ia3Config
from graftwork_plugins.builtin.strategies.lora import LoraConfig
from graftwork_plugins.builtin.strategies.qlora import QloraConfig
from graftwork_server.tuning.automatic import automatic_settings, choose_held_out, given_settings
from graftwork_server.tuning.schedule import held_out_count, total_steps


def base(width: int) -> BaseInfo:
    return BaseInfo(
        fingerprint="",
        architecture="",
        config={},
        linear_modules={},
        output_module=None,
        parameter_count=0,
        weight_bytes=0,
        dtype="float32",
        embedding_modules={"embed": (100, width)},
        input_module="embed",
    )


def chosen(
    kind: type[TrainingConfig], rows: int = 90, held_out: int = 10, width: int = 256, **given: Any
) -> dict[str, Any]:
    settings = kind.model_validate(given)
    choices = automatic_settings(settings, base(width), rows, held_out)
    assert all(choice.automatic and choice.reason for choice in choices)
    values = {choice.key: choice.value for choice in choices}
    assert len(values) == len(choices)
    kind.model_validate(given | values)
    return values


def test_a_hundred_rows_and_no_settings() -> None:
    fraction = choose_held_out({}, 100)
    assert fraction is not None
    assert held_out_count(100, fraction.value) == 10
    assert chosen(LoraConfig) == {
        "learning_rate": 3.2e-3,
        "max_steps": 150,
        "warmup_ratio": 0.0667,
        "published_weights": "best",
        "eval_steps": 10,
        "early_stopping_patience": 8,
    }


@pytest.mark.parametrize(
    ("rows", "batch_size", "steps"),
    [
        (1, 16, 150),
        (90, 16, 150),
        (800, 16, 150),
        (900, 16, 171),  # three passes
        (1900, 16, 357),
        (8000, 16, 1500),
        (16_000, 16, 1500),
        (160_000, 16, 10_000),  # one pass
        (160_000, 64, 2500),
    ],
)
def test_steps_have_a_floor_and_a_ceiling(rows: int, batch_size: int, steps: int) -> None:
    assert chosen(LoraConfig, rows, 0, batch_size=batch_size)["max_steps"] == steps


@pytest.mark.parametrize("rows", [0, 10, 49])
def test_few_rows_are_all_trained_on(rows: int) -> None:
    fraction = choose_held_out({}, rows)
    assert fraction is not None
    assert fraction.value == 0
    assert chosen(LoraConfig, rows, 0).keys() == {"learning_rate", "max_steps", "warmup_ratio"}


@pytest.mark.parametrize("rows", [50, 51, 77, 100, 333, 1999, 2000, 100_000])
def test_as_many_rows_are_held_out_as_was_said(rows: int) -> None:
    choice = choose_held_out({}, rows)
    assert choice is not None
    assert choice.value <= 0.5
    held_out = held_out_count(rows, choice.value)
    assert 5 <= held_out <= 200
    assert choice.reason.startswith(f"{held_out} of {rows} rows")


@pytest.mark.parametrize("given", [{"max_steps": 40}, {"num_epochs": 2}, {"max_steps": 0}])
def test_fixed_steps_are_done_all_of_them_on_all_rows(given: dict[str, Any]) -> None:
    assert choose_held_out(given, 100) is None
    assert chosen(LoraConfig, 100, 0, **given).keys() == {"learning_rate", "warmup_ratio"}
    # With rows that the user holds out: measured as ever, after each epoch; the best of what is measured is published.
    with_validation = chosen(LoraConfig, 100, 20, **given)
    assert with_validation.keys() == {"learning_rate", "warmup_ratio", "published_weights"}
    config = LoraConfig.model_validate(given)
    assert total_steps(config.model_copy(update=with_validation), 100) == total_steps(config, 100)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 1e-4),
        ("learning_rate", 5e-4),  # the default's own value, said aloud
        ("warmup_ratio", 0),
        ("eval_steps", 7),
        ("eval_steps", 0),
        ("early_stopping_patience", 0),
        ("published_weights", "last"),
    ],
)
def test_what_is_set_is_not_chosen(key: str, value: Any) -> None:
    assert chosen(LoraConfig, **{key: value}) == {k: v for k, v in chosen(LoraConfig).items() if k != key}
    assert [(c.key, c.value, c.automatic) for c in given_settings({key: value})] == [(key, value, False)]


def test_the_rate_follows_width_and_scale() -> None:
    def rate(kind: type[TrainingConfig], width: int, **given: Any) -> float:
        return float(chosen(kind, width=width, **given)["learning_rate"])

    assert [rate(FullConfig, width) for width in (256, 1024, 4096, 8192)] == [3.2e-4, 8e-5, 2e-5, 1e-5]
    assert [rate(LoraConfig, width) for width in (256, 1024, 4096, 8192)] == [3.2e-3, 8e-4, 2e-4, 1e-4]
    assert rate(QloraConfig, 4096) == 4e-4  # its lora_alpha is half of LoRA's
    for rank in (1, 8, 256):
        assert rate(LoraConfig, 4096, r=rank) == 2e-4
    assert rate(LoraConfig, 4096, lora_alpha=64) == 1e-4
    assert rate(LoraConfig, 4096, r=16, lora_alpha=8, use_rslora=True) == 2e-4
    assert rate(LoraConfig, 4096, lora_alpha=0.001) <= 0.02
    assert "learning_rate" not in chosen(Ia3Config)


class Own(TrainingConfig):
    """As an outsider writes it who knows nothing of automatic settings."""

    learning_rate: float = Field(7e-3, gt=0)
    num_epochs: float = 5.0
    warmup_ratio: float = 0.2


class OwnLora(LoraConfig):
    """Takes over LoRA's settings, but for the rate."""

    learning_rate: float = Field(1e-3, gt=0)


class Marked(TrainingConfig):
    """Knows of them."""

    learning_rate: Annotated[float, Automatic(lambda config, base: Choice(1 / base.parameter_count, ""))] = 1.0


def test_defaults_that_a_strategy_declares_are_kept() -> None:
    assert chosen(Own).keys() == {"published_weights", "eval_steps", "early_stopping_patience"}
    assert chosen(Own, 90)["eval_steps"] == math.ceil(total_steps(Own(), 90) / 15)
    assert chosen(OwnLora) == {key: value for key, value in chosen(LoraConfig).items() if key != "learning_rate"}
    with pytest.raises(ZeroDivisionError):
        chosen(Marked)


@pytest.mark.parametrize("held_out", [1, 10, 200, 5000, 10**6])
@pytest.mark.parametrize("rows", [1, 90, 2000, 10**6])
def test_measuring_takes_a_bounded_part_of_the_time(rows: int, held_out: int) -> None:
    values = chosen(LoraConfig, rows, held_out)
    steps, every = values["max_steps"], values["eval_steps"]
    assert 1 <= every <= steps
    assert every == steps or held_out / 16 / 3 <= every / 5


@pytest.mark.parametrize("steps", [1, 2, 12, 40, 150, 1500, 100_000])
def test_the_warmup_is_short(steps: int) -> None:
    ratio = chosen(LoraConfig, max_steps=steps)["warmup_ratio"]
    warmup = math.ceil(ratio * steps)
    assert warmup <= max(1, math.ceil(0.1 * steps))
    assert warmup >= min(10, math.ceil(0.1 * steps))
