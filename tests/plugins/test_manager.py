"""Plugins are found, guarded, checked and kept apart."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path
from typing import Any

import pytest

from graftwork_plugins import Artifact, ArtifactError, hookspecs
from graftwork_plugins.manager import GROUP, PluginManager

Write = Callable[..., EntryPoint]

GOOD = """
    from graftwork_plugins import Estimate, Strategy, TrainingConfig, hookimpl

    class Mine(Strategy):
        id = "mine"
        version = "1.0"
        def estimate(self, config, base, dataset, device): return Estimate(
            trained_parameters=0, memory_bytes=0, artifact_bytes=0)
        def build(self, base, config): raise NotImplementedError
        def save(self, trainable): raise NotImplementedError
        def load(self, artifact, base): return []

    @hookimpl
    def graftwork_register_strategies():
        return [Mine()]
"""

BUILTIN = EntryPoint("lora", "graftwork_plugins.builtin.strategies.lora", GROUP)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a plugin module of a distribution of its own and returns its entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = 0

    def write(source: str, *, distribution: str = "somebody", name: str = "") -> EntryPoint:
        nonlocal count
        count += 1
        module = f"plugin_of_test_{count}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.delitem(sys.modules, module, raising=False)
        info = tmp_path / f"{distribution}-{count}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {distribution}\nVersion: 1.{count}\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name or module} = {module}\n")
        (entry_point,) = PathDistribution(info).entry_points
        return entry_point

    return write


def test_the_strategies_on_board_are_found_through_their_entry_points() -> None:
    manager = PluginManager.load()
    assert {"lora", "full"} <= set(manager.strategies)
    assert manager.strategies["lora"].distribution.startswith("graftwork ")


def test_a_plugin_is_found(plugin: Write) -> None:
    manager = PluginManager.load([plugin(GOOD), BUILTIN])
    assert list(manager.strategies) == ["lora", "mine"]
    assert manager.strategies["mine"].distribution == "somebody 1.1"
    assert manager.failures == []


BROKEN: dict[str, tuple[str, str]] = {
    "raises on import": ("raise RuntimeError('no')", "RuntimeError: no"),
    "exits on import": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "lacks a dependency": ("import no_such_module_here", "ModuleNotFoundError"),
    "is no Python": ("def", "SyntaxError"),
    "has no hooks": ("x = 1", "no function marked with"),
    "has an unknown hook": (
        GOOD + "\n    @hookimpl\n    def graftwork_no_such_hook(): ...",
        "graftwork_no_such_hook",
    ),
    "takes an unknown argument": (
        GOOD + "\n    @hookimpl\n    def graftwork_identify_artifact(artifact, colour): ...",
        "colour",
    ),
    "raises in its hook": (GOOD.replace("return [Mine()]", "return [Mine()][3]"), "IndexError"),
    "exits in its hook": (GOOD.replace("return [Mine()]", "raise SystemExit"), "SystemExit"),
    "returns one strategy": (GOOD.replace("[Mine()]", "Mine()"), "returned Mine, not a list"),
    "returns a class": (GOOD.replace("[Mine()]", "[Mine]"), "Mine is a class"),
    "returns something else": (GOOD.replace("[Mine()]", "[3]"), "int is no graftwork_plugins.Strategy"),
    "is abstract": (GOOD.replace("def save", "def store"), "TypeError.*save"),
    "is of another API version": (GOOD.replace('"1.0"', '"1.0"; api = 2'), "API version 2; this server has 1"),
    "has a bad id": (GOOD.replace('"mine"', '"../Mine"'), "1 to 64 of a-z"),
    "has no version": (GOOD.replace('version = "1.0"', ""), "version is None"),
    "has an unknown capability": (GOOD.replace('"1.0"', '"1.0"; capabilities = {"fly"}'), "capabilities has .*fly"),
    "has another config": (GOOD.replace('"1.0"', '"1.0"; Config = dict'), "Config must be a class that inherits"),
    "accepts unknown keys": (
        GOOD.replace(
            "class Mine(Strategy):",
            "class Loose(TrainingConfig, extra='allow'): ...\n\n    class Mine(Strategy):\n        Config = Loose",
        ),
        "refuse unknown keys",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_listed_and_costs_only_itself(plugin: Write, case: str) -> None:
    source, error = BROKEN[case]
    entry_point = plugin(source, distribution="broken", name="their-name")
    manager = PluginManager.load([entry_point, BUILTIN])
    assert list(manager.strategies) == ["lora"]
    (failure,) = manager.failures
    assert (failure.id, failure.distribution) == ("their-name", "broken 1.1")
    assert re.search(error, failure.error), failure.error


def test_an_entry_point_that_names_nothing_is_listed() -> None:
    manager = PluginManager.load([EntryPoint("lost", "graftwork_plugins.builtin.strategies.lora:nothing", GROUP)])
    assert "AttributeError" in manager.failures[0].error


def test_an_id_claimed_twice_belongs_to_nobody(plugin: Write) -> None:
    manager = PluginManager.load([plugin(GOOD, distribution="one"), plugin(GOOD, distribution="two"), BUILTIN])
    assert list(manager.strategies) == ["lora"]
    assert {failure.distribution for failure in manager.failures} == {"one 1.1", "two 1.2"}
    for failure in manager.failures:
        assert failure.id == "mine"
        assert "one 1.1 and two 1.2" in failure.error


def test_an_id_on_board_cannot_be_taken(plugin: Write) -> None:
    manager = PluginManager.load([plugin(GOOD.replace('"mine"', '"lora"'), distribution="thief"), BUILTIN])
    assert type(manager.strategies["lora"].strategy).__name__ == "Lora"
    (failure,) = manager.failures
    assert (failure.id, failure.distribution) == ("lora", "thief 1.1")


IDENTIFY = GOOD + "\n    @hookimpl\n    def graftwork_identify_artifact(artifact):\n        {}\n"


def test_plugins_are_asked_what_an_artifact_is(plugin: Write, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    artifact = Artifact(folder)

    def answer(body: str, **named: Any) -> str | None:
        return PluginManager.load([plugin(IDENTIFY.format(body), **named), BUILTIN]).identify(artifact)

    assert PluginManager.load([BUILTIN]).identify(artifact) == "lora"
    assert answer("return 'mine'") == "mine"  # others come before the ones on board
    assert answer("return None") == "lora"
    assert answer("raise KeyError('x')") == "lora"
    assert answer("raise SystemExit") == "lora"
    assert answer("return 3") == "lora"
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        PluginManager.load([BUILTIN]).identify(artifact)


def test_every_hook_is_described() -> None:
    hooks = [value for name, value in vars(hookspecs).items() if name.startswith("graftwork_")]
    assert {hook.__name__ for hook in hooks} == {"graftwork_register_strategies", "graftwork_identify_artifact"}
    for hook in hooks:
        assert "Called" in (hook.__doc__ or ""), f"{hook.__name__} does not say who calls it"


def test_strategies_are_listed_without_torch() -> None:
    code = (
        "import sys; from graftwork_plugins.manager import PluginManager;"
        "assert {'lora', 'full'} <= set(PluginManager.load().strategies);"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
