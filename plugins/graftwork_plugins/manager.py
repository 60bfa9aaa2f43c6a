"""Finds the plugins, imports each under its own guard, and keeps their strategies apart from what failed.

A plugin that raises, exits or brings something unusable costs only itself: it is listed in `failures`, with what went
wrong, and the process goes on. An id that two distributions claim belongs to neither, since which one came first would
be chance; the ids on board cannot be claimed by others at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, get_args

import pluggy

from graftwork_plugins import hookspecs
from graftwork_plugins.strategy import API_VERSION, Artifact, ArtifactError, Capability, Strategy, TrainingConfig

GROUP = "graftwork.strategies"
"""The entry point group of plugins."""

STRATEGY_ID = re.compile(r"[a-z0-9_-]{1,64}")

_ON_BOARD = "graftwork_plugins.builtin."

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class LoadedStrategy:
    """A strategy that can be used, and who brought it."""

    strategy: Strategy
    distribution: str
    """Name and version of the installed distribution."""


@dataclass(frozen=True)
class LoadFailure:
    """A plugin or strategy that cannot be used, and why."""

    id: str
    """The strategy's id where it is known, else the entry point's name."""
    distribution: str
    error: str


class PluginError(Exception):
    """A plugin does not keep to the contract; the text says how."""


class PluginManager:
    """The plugins of this process. Made by `load`; immutable afterwards."""

    def __init__(self) -> None:
        self.strategies: dict[str, LoadedStrategy] = {}
        """By id, the ones on board first."""
        self.failures: list[LoadFailure] = []
        self._plugins = pluggy.PluginManager("graftwork")
        self._plugins.add_hookspecs(hookspecs)

    @classmethod
    def load(cls, entry_points: Iterable[EntryPoint] | None = None) -> PluginManager:
        """Imports the plugins of `entry_points`; None: of every installed distribution."""
        manager = cls()
        found = _installed() if entry_points is None else list(entry_points)
        offered: list[tuple[EntryPoint, Strategy]] = []
        for entry_point in sorted(found, key=_loading_order):
            try:
                strategies = _guarded(lambda ep=entry_point: manager._register(ep))  # type: ignore[misc]
            except PluginError as error:
                manager._fail(entry_point.name, entry_point, str(error))
            else:
                offered += [(entry_point, strategy) for strategy in strategies]
        manager._accept(offered)
        return manager

    def identify(self, artifact: Artifact) -> str | None:
        """Asks the plugins' graftwork_identify_artifact, last registered first; a plugin that raises is passed over.

        ArtifactError goes through to the caller: the plugin knows these files, and they are damaged.
        """
        for implementation in reversed(self._plugins.hook.graftwork_identify_artifact.get_hookimpls()):
            ask = self._only(implementation.plugin, "graftwork_identify_artifact")
            try:
                answer = _guarded(lambda ask=ask: ask(artifact=artifact))  # type: ignore[misc]
            except PluginError as error:
                _log.warning("plugin %s: graftwork_identify_artifact: %s", implementation.plugin_name, error)
                continue
            if isinstance(answer, str):
                return answer
        return None

    def _register(self, entry_point: EntryPoint) -> list[Strategy]:
        """Imports one plugin and returns its strategies. Whatever it raises, nothing of it stays registered."""
        plugin = entry_point.load()
        name = f"{_distribution(entry_point)}:{entry_point.name}"
        if self._plugins.is_registered(plugin):
            raise PluginError(f"{entry_point.value} is named by two entry points")
        try:
            self._plugins.register(plugin, name)
            self._plugins.check_pending()
            if not self._plugins.get_hookcallers(plugin):
                raise PluginError(f"{entry_point.value} has no function marked with graftwork_plugins.hookimpl")
            answers = self._only(plugin, "graftwork_register_strategies")()
            return _checked(answers)
        except BaseException:
            if self._plugins.is_registered(plugin):
                self._plugins.unregister(plugin)
            raise

    def _only(self, plugin: Any, hook: str) -> pluggy.HookCaller:
        """The hook as called for one plugin alone, so that a failure is that plugin's."""
        others = [other for other in self._plugins.get_plugins() if other is not plugin]
        return self._plugins.subset_hook_caller(hook, others)

    def _accept(self, offered: list[tuple[EntryPoint, Strategy]]) -> None:
        by_id: dict[str, list[tuple[EntryPoint, Strategy]]] = {}
        for entry_point, strategy in offered:
            by_id.setdefault(strategy.id, []).append((entry_point, strategy))
        for id, claims in by_id.items():
            owners = [claim for claim in claims if _is_on_board(claim[0])] or claims
            if len(owners) == 1:
                entry_point, strategy = owners[0]
                self.strategies[id] = LoadedStrategy(strategy, _distribution(entry_point))
            names = " and ".join(_distribution(entry_point) for entry_point, _ in claims)
            refused = claims if len(owners) > 1 else [claim for claim in claims if claim not in owners]
            for entry_point, _ in refused:
                self._fail(id, entry_point, f"the id {id!r} is claimed by {names}; uninstall or rename one")

    def _fail(self, id: str, entry_point: EntryPoint, error: str) -> None:
        self.failures.append(LoadFailure(id, _distribution(entry_point), error))
        _log.warning("plugin %s of %s is not used: %s", entry_point.name, _distribution(entry_point), error)


def _guarded(call: Callable[[], _T]) -> _T:
    """Runs a plugin's code; whatever it raises, SystemExit included, becomes a PluginError naming it."""
    try:
        return call()
    except (KeyboardInterrupt, MemoryError, ArtifactError, PluginError):
        raise
    except pluggy.PluginValidationError as error:
        raise PluginError(str(error)) from error
    except BaseException as error:
        raise PluginError(f"{type(error).__name__}: {error}") from error


def _installed() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))


def _loading_order(entry_point: EntryPoint) -> tuple[bool, str, str]:
    """On board first, so that others are asked before them; then by name, so that every process agrees."""
    return not _is_on_board(entry_point), _distribution(entry_point), entry_point.name


def _is_on_board(entry_point: EntryPoint) -> bool:
    return entry_point.value.startswith(_ON_BOARD)


def _distribution(entry_point: EntryPoint) -> str:
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist is not None else "an unknown distribution"


def _checked(answers: Any) -> list[Strategy]:
    """The strategies of one plugin. Raises PluginError at the first that is none of this API version."""
    strategies: list[Strategy] = []
    for answer in answers:
        if not isinstance(answer, list | tuple):
            raise PluginError(
                f"graftwork_register_strategies returned {type(answer).__name__}, not a list of strategies"
            )
        strategies += [_checked_strategy(strategy) for strategy in answer]
    return strategies


def _checked_strategy(strategy: Any) -> Strategy:
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        raise PluginError(f"{strategy.__name__} is a class; return an instance of it")
    if not isinstance(strategy, Strategy):
        raise PluginError(f"{type(strategy).__name__} is no graftwork_plugins.Strategy")
    name = type(strategy).__name__
    if strategy.api != API_VERSION:
        raise PluginError(f"{name} is written for API version {strategy.api}; this server has {API_VERSION}")
    id = getattr(strategy, "id", None)
    if not isinstance(id, str) or not STRATEGY_ID.fullmatch(id):
        raise PluginError(f"{name}.id is {id!r}; it must be 1 to 64 of a-z, 0-9, '-' and '_'")
    version = getattr(strategy, "version", None)
    if not isinstance(version, str) or not version:
        raise PluginError(f"{name}.version is {version!r}; it must be text such as '1.0'")
    if unknown := set(strategy.capabilities) - set(get_args(Capability)):
        raise PluginError(f"{name}.capabilities has {sorted(map(str, unknown))}; known: {list(get_args(Capability))}")
    config = strategy.Config
    if not (isinstance(config, type) and issubclass(config, TrainingConfig)):
        raise PluginError(f"{name}.Config must be a class that inherits from graftwork_plugins.TrainingConfig")
    if config.model_config.get("extra") != "forbid":
        raise PluginError(f"{name}.Config must refuse unknown keys (extra='forbid', as it inherits)")
    config.model_json_schema()
    return strategy
