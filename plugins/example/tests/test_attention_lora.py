"""The whole proof: the kit's battery on this strategy."""

from graftwork_attention_lora import AttentionLora

from graftwork_plugins.testing import StrategyBattery


class TestAttentionLora(StrategyBattery):
    """Two layers of a toy model are little to learn with, hence the learning rate."""

    strategy = AttentionLora()
    learning_rate = 0.05
