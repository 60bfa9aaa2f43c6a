"""The strategies on board that train pass the kit that outsiders are given."""

from __future__ import annotations

from graftwork_plugins.builtin.strategies.full import FullTuning
from graftwork_plugins.builtin.strategies.ia3 import Ia3
from graftwork_plugins.builtin.strategies.lora import Lora
from graftwork_plugins.builtin.strategies.qlora import Qlora
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


class TestQlora(StrategyBattery):
    """The defaults; their learning rate is for models whose updates need not be large."""

    strategy = Qlora()
    settings = {"lora_dropout": 0.0}
    quantization = "nf4"


class TestFull(StrategyBattery):
    """Full tuning."""

    strategy = FullTuning()
    learning_rate = 0.003


class TestIa3(StrategyBattery):
    """On more layers than by default: the toy needs some parameters to learn with."""

    strategy = Ia3()
    settings = {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    }
    learning_rate = 0.3
