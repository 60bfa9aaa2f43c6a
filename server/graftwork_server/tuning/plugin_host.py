"""Strategies as the engine worker and the tuner use them: every call into a plugin is guarded here.

What a plugin raises about its input (ArtifactError, ConfigError) becomes an error that names the key; anything else
becomes PLUGIN_FAILED, naming the plugin. The front never imports a plugin, and none is called in the token loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from graftwork_plugins import (
    Artifact,
    ArtifactError,
    BaseInfo,
    ConfigError,
    DatasetInfo,
    Delta,
    DeviceInfo,
    Strategy,
    TrainingConfig,
    UnsupportedBase,
)
from graftwork_plugins.manager import LoadedStrategy, PluginManager
from graftwork_server.errors import (
    FailedPrecondition,
    GraftworkServerError,
    InvalidArgument,
    NotFound,
    Violation,
)
from graftwork_server.tuning.automatic import automatic_settings, given_settings
from graftwork_server.tuning.schedule import total_steps
from graftwork_server.types import StrategyInfo, TuningEstimate
from graftwork_server.wire.tuning import PreparedJob

TUNER_PROCESS_BYTES = 700 * 1024 * 1024
"""What a tuner process takes before it trains anything: the interpreter, torch, transformers, peft."""

_log = logging.getLogger(__name__)


class PluginHost:
    """The plugins of this process."""

    def __init__(self, manager: PluginManager | None = None) -> None:
        """Loads every installed plugin unless `manager` brings its own."""
        self._manager = manager or PluginManager.load()

    def infos(self) -> list[StrategyInfo]:
        """Every strategy, and every plugin that failed to load, by id."""
        usable = [_info(id, loaded) for id, loaded in self._manager.strategies.items()]
        failed = [
            StrategyInfo(id=failure.id, distribution=failure.distribution, load_error=failure.error)
            for failure in self._manager.failures
        ]
        return sorted(usable + failed, key=lambda info: (info.id, info.load_error, info.distribution))

    def strategy(self, id: str) -> Strategy:
        """The strategy `id`. Raises NotFound (STRATEGY_NOT_FOUND) or FailedPrecondition (STRATEGY_NOT_LOADED)."""
        loaded = self._manager.strategies.get(id)
        if loaded is not None:
            return loaded.strategy
        for failure in self._manager.failures:
            if failure.id == id:
                raise FailedPrecondition(
                    f"strategy {id!r} of {failure.distribution} could not be loaded: {failure.error}",
                    reason="STRATEGY_NOT_LOADED",
                    field="strategy",
                )
        known = ", ".join(sorted(self._manager.strategies))
        raise NotFound(
            f"there is no strategy {id!r}; there are: {known}", reason="STRATEGY_NOT_FOUND", field="strategy"
        )

    def identify(self, path: Path) -> str:
        """Id of the strategy that serves the files in `path`.

        Raises FailedPrecondition: ARTIFACT_NOT_RECOGNISED, saying what would be, or ARTIFACT_REJECTED.
        """
        artifact = Artifact(path)
        with guard("identify", "graftwork_identify_artifact"):
            id = self._manager.identify(artifact)
        if id is not None and id in self._manager.strategies:
            return id
        names = artifact.names()
        found = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        known = "; ".join(
            f"{id}: {loaded.strategy.artifact_files}"
            for id, loaded in sorted(self._manager.strategies.items())
            if loaded.strategy.artifact_files
        )
        raise FailedPrecondition(
            f"no strategy recognises these files: {found or 'none'}. Recognised are: {known}",
            reason="ARTIFACT_NOT_RECOGNISED",
        )

    def load_deltas(self, path: Path, strategy_id: str, base: BaseInfo) -> list[Delta]:
        """The deltas of the artifact in `path`.

        Raises FailedPrecondition: ARTIFACT_REJECTED, with the tensor or key as the violation's field, or PLUGIN_FAILED.
        """
        strategy = self.strategy(strategy_id)
        with guard(strategy_id, "load"):
            deltas = list(strategy.load(Artifact(path), base))
            if not deltas:
                raise ArtifactError("tensors", "the artifact changes nothing: it holds no tensors")
            for delta in deltas:
                if not isinstance(delta, Delta):
                    raise TypeError(f"load returned {type(delta).__name__}, which is no delta")
            return deltas

    def prepare_job(
        self,
        strategy: str,
        config: dict[str, Any],
        row_count: int,
        total_tokens: int,
        base: BaseInfo,
        device: DeviceInfo,
        held_out_rows: int = 0,
    ) -> PreparedJob:
        """A job's settings with every one filled in, where they come from, and what the job will take.

        `row_count` and `total_tokens` are of the rows trained on, held-out ones not counted. Raises InvalidArgument
        (CONFIG_INVALID) with a violation `spec.config.<key>` for each wrong setting, FailedPrecondition
        (NOT_TRAINABLE, PLUGIN_FAILED).
        """
        plugin = self.strategy(strategy)
        if "train" not in plugin.capabilities:
            raise FailedPrecondition(f"strategy {strategy!r} cannot train", reason="NOT_TRAINABLE", field="strategy")
        settings = parse_config(plugin, config)
        with guard(strategy, "Config"):
            choices = automatic_settings(settings, base, row_count, held_out_rows)
        settings = parse_config(plugin, config | {choice.key: choice.value for choice in choices})
        with guard(strategy, "validate"):
            plugin.validate(settings, base)
        with guard(strategy, "estimate"):
            dataset = DatasetInfo(row_count=row_count, total_tokens=total_tokens)
            estimate = plugin.estimate(settings, base, dataset, device)
        return PreparedJob(
            config=settings.model_dump(mode="json"),
            choices=[*given_settings(config), *choices],
            estimate=TuningEstimate(
                trained_parameters=estimate.trained_parameters,
                memory_bytes=estimate.memory_bytes + TUNER_PROCESS_BYTES,
                artifact_bytes=estimate.artifact_bytes,
                total_steps=total_steps(settings, row_count),
            ),
        )


def parse_config(strategy: Strategy, config: dict[str, Any]) -> TrainingConfig:
    """`config` as the strategy's Config. Raises InvalidArgument (CONFIG_INVALID)."""
    try:
        return strategy.Config.model_validate(config)
    except ValidationError as error:
        accepted = ", ".join(sorted(strategy.Config.model_fields))
        violations = _violations(error, strategy.Config.model_json_schema(), accepted)
        raise InvalidArgument(
            violations[0].description if len(violations) == 1 else f"{len(violations)} settings are wrong",
            reason="CONFIG_INVALID",
            violations=violations,
        ) from None


@contextlib.contextmanager
def guard(strategy_id: str, call: str) -> Iterator[None]:
    """Around a call into a plugin: its exceptions become ours. Memory errors pass, for the caller to explain."""
    try:
        yield
    except (GraftworkServerError, KeyboardInterrupt, MemoryError):
        raise
    except ArtifactError as error:
        raise FailedPrecondition(error.message, reason="ARTIFACT_REJECTED", field=error.key) from error
    except ConfigError as error:
        raise InvalidArgument(error.message, reason="CONFIG_INVALID", field=f"spec.config.{error.field}") from error
    except UnsupportedBase as error:
        raise FailedPrecondition(str(error), reason="NOT_TRAINABLE", field="strategy") from error
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        _log.exception("plugin %s failed in %s", strategy_id, call)
        raise FailedPrecondition(
            f"plugin {strategy_id!r} failed in {call}: {type(error).__name__}: {error}", reason="PLUGIN_FAILED"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, the host's or a device's. torch has no type of its own for the host."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _info(id: str, loaded: LoadedStrategy) -> StrategyInfo:
    strategy = loaded.strategy
    return StrategyInfo(
        id=id,
        version=strategy.version,
        api_version=strategy.api,
        distribution=loaded.distribution,
        description=strategy.description,
        capabilities=sorted(strategy.capabilities),
        config_json_schema=json.dumps(strategy.Config.model_json_schema()),
    )


def _violations(error: ValidationError, schema: dict[str, Any], accepted: str) -> list[Violation]:
    """One for each wrong setting: pydantic has one for each kind of value that a setting could have had."""
    found: dict[str, Violation] = {}
    unknown = 0
    details = error.errors(include_url=False)
    for detail in details:
        key = str(detail["loc"][0]) if detail["loc"] else ""
        kinds = schema.get("properties", {}).get(key, {})
        if detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1:
            # Said once: the list is long.
            what = f"{key} is no setting of this strategy" + ("" if unknown else f"; its settings are: {accepted}")
            unknown += 1
        elif "anyOf" in kinds and sum(one["loc"][:1] == (key,) for one in details) > 1:
            what = f"{key}: {' or '.join(_shown_kind(kind) for kind in kinds['anyOf'])} is accepted{_how(key, kinds)}"
        else:
            path = ".".join(str(part) for part in detail["loc"])
            what = f"{path} = {repr(detail['input'])[:80]}: {detail['msg'].removeprefix('Value error, ')}"
            found.setdefault(path, Violation(f"spec.config.{path}", what))
            continue
        found.setdefault(key, Violation(f"spec.config.{key}", what))
    return list(found.values())


_KINDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}


def _shown_kind(kind: dict[str, Any]) -> str:
    """A JSON schema of a value, as people say it."""
    if "const" in kind:
        return str(kind["const"])
    if "enum" in kind:
        return " or ".join(map(str, kind["enum"]))
    shown = _KINDS.get(str(kind.get("type")), "another value")
    items = kind.get("items", {}).get("type")
    return f"{shown} of {_KINDS[items]}s" if items == "string" else shown


def _how(key: str, kinds: dict[str, Any]) -> str:
    """How a list is written on the command line, where one is accepted."""
    if not any(kind.get("type") == "array" for kind in kinds["anyOf"]):
        return ""
    example = json.dumps((kinds.get("examples") or [["a", "b"]])[0])
    return f", such as {example} (on the command line: --set {key}='{example}')"
