"""Both strategies on board pass the kit that outsiders are given."""

from __future__ import annotations

from graftwork_plugins.builtin.full import FullTuning
from graftwork_plugins.builtin.lora import Lora
from graftwork_plugins.testing import StrategyBattery


class TestLora(StrategyBattery):
    """The defaults."""

    strategy = Lora()


class TestLoraWithPatterns(StrategyBattery):
    """Every setting that changes the mathematics, at once."""

    strategy = Lora()
    settings = {
        "r": 4,
        "lora_alpha": 5,
        "use_rslora": True,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "down_proj", "lm_head"],
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 9.5},
    }


class TestFull(StrategyBattery):
    """Full tuning."""

    strategy = FullTuning()
    learning_rate = 0.003
