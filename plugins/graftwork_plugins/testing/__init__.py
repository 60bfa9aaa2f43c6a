"""A kit to prove a strategy: subclass StrategyBattery, name the strategy, run pytest.

    from graftwork_plugins.testing import StrategyBattery
    from my_strategy import MyStrategy

    class TestMyStrategy(StrategyBattery):
        strategy = MyStrategy()

Needs torch, transformers and pytest. Every model is small, random and made here.
"""

from graftwork_plugins.testing.battery import StrategyBattery
from graftwork_plugins.testing.memory import PeakResidentMemory
from graftwork_plugins.testing.models import base_handle, logits_of, make_model
from graftwork_plugins.testing.serving import apply_deltas, write_artifact
from graftwork_plugins.testing.training import make_rows, train_steps

__all__ = [
    "PeakResidentMemory",
    "StrategyBattery",
    "apply_deltas",
    "base_handle",
    "logits_of",
    "make_model",
    "make_rows",
    "train_steps",
    "write_artifact",
]
