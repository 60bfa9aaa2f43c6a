"""The example is really installable, is found by its entry point, and passes the kit."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from graftwork_plugins.manager import GROUP, PluginManager
from graftwork_plugins.testing import StrategyBattery

EXAMPLE = Path(__file__).parents[2] / "plugins" / "example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder it was installed into, by pip, from its own pyproject.toml."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(EXAMPLE)], check=True, timeout=120)
    return target


def test_it_is_installed_and_found(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.delitem(sys.modules, "graftwork_attention_lora", raising=False)
    (distribution,) = distributions(path=[str(installed)])
    manager = PluginManager.load(distribution.entry_points.select(group=GROUP))
    assert manager.failures == []
    loaded = manager.strategies["attention-lora"]
    assert loaded.distribution == "graftwork-attention-lora 0.1.0"
    module = importlib.import_module("graftwork_attention_lora")
    assert module.__file__ is not None
    assert Path(module.__file__).is_relative_to(installed)


sys.path.insert(0, str(EXAMPLE))
example = importlib.import_module("graftwork_attention_lora")
sys.path.remove(str(EXAMPLE))


class TestExample(StrategyBattery):
    """The battery of its own tests/."""

    strategy = example.AttentionLora()
    learning_rate = 0.05
