"""What a plugin raises becomes an error that names the key, or the plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftwork_plugins import (
    ArtifactError,
    BaseInfo,
    ConfigError,
    DeviceInfo,
    Estimate,
    Strategy,
)
from graftwork_plugins.manager import LoadedStrategy, LoadFailure, PluginManager
from graftwork_server.errors import FailedPrecondition, InvalidArgument, NotFound
from graftwork_server.tuning.plugin_host import TUNER_PROCESS_BYTES, PluginHost

BASE = BaseInfo(
    fingerprint="sha256:0",
    architecture="LlamaForCausalLM",
    config={"vocab_size": 100},
    linear_modules={"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.mlp.up_proj": (8, 16)},
    output_module=None,
    parameter_count=1000,
    weight_bytes=4000,
    dtype="float32",
)
DEVICE = DeviceInfo(type="cpu", total_memory_bytes=2**34, threads=2)


class Faulty(Strategy):
    """Raises what it is told to, where it is told to."""

    id = "faulty"
    version = "1"
    raised: BaseException | None = None
    deltas: Any = ()

    def validate(self, config: Any, base: BaseInfo) -> None:
        if self.raised is not None:
            raise self.raised

    def estimate(self, *arguments: Any) -> Estimate:
        return Estimate(trained_parameters=1, memory_bytes=2, artifact_bytes=3)

    def build(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def save(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def load(self, *arguments: Any) -> Any:
        if self.raised is not None:
            raise self.raised
        return self.deltas


@pytest.fixture
def host() -> PluginHost:
    """With a faulty plugin and one that failed to load beside the ones on board."""
    manager = PluginManager.load()
    manager.strategies["faulty"] = LoadedStrategy(Faulty(), "faulty 1")
    manager.failures.append(LoadFailure("broken", "broken 2", "ImportError: no"))
    return PluginHost(manager)


def fault(host: PluginHost, raised: BaseException | None, deltas: Any = ()) -> None:
    strategy = host.strategy("faulty")
    assert isinstance(strategy, Faulty)
    strategy.raised, strategy.deltas = raised, deltas


def test_infos_list_strategies_and_failures(host: PluginHost) -> None:
    infos = {info.id: info for info in host.infos()}
    assert list(infos) == sorted(infos)
    assert infos["broken"].load_error == "ImportError: no"
    assert infos["lora"].capabilities == ["serve", "train"]
    schema = json.loads(infos["lora"].config_json_schema)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["r"]["default"] == 16


def prepare(host: PluginHost, config: dict[str, Any], strategy: str = "lora") -> Any:
    return host.prepare_job(strategy, config, row_count=40, total_tokens=400, base=BASE, device=DEVICE)


def test_a_job_is_prepared_with_every_default(host: PluginHost) -> None:
    prepared = prepare(host, {"r": 2.0, "batch_size": 8})  # numbers come as floats over the wire
    assert prepared.config["r"] == 2
    assert prepared.config["target_modules"] == "all-linear"
    assert json.loads(json.dumps(prepared.config)) == prepared.config
    again = prepare(host, prepared.config)
    assert (again.config, again.estimate) == (prepared.config, prepared.estimate)
    assert {choice.key: choice.automatic for choice in prepared.choices} == {
        **dict.fromkeys(("r", "batch_size"), False),
        **dict.fromkeys(("learning_rate", "max_steps", "warmup_ratio"), True),
    }
    assert all(prepared.config[choice.key] == choice.value for choice in prepared.choices)
    assert prepared.estimate.total_steps == 150
    assert prepare(host, {"num_epochs": 3, "batch_size": 8}).estimate.total_steps == 15
    assert prepared.estimate.trained_parameters == 2 * (16 + 24)
    assert prepared.estimate.memory_bytes > TUNER_PROCESS_BYTES


@pytest.mark.parametrize(
    ("config", "field", "message"),
    [
        ({"rank": 3}, "rank", "its settings are: .*lora_alpha.*, r,"),
        ({"r": "many"}, "r", "many"),
        ({"r": 0}, "r", "greater than or equal to 1"),
        ({"r": True}, "r", "^r = True: a number is accepted, not true or false"),
        ({"learning_rate": float("nan")}, "learning_rate", "finite"),
        ({"lr_scheduler": "step"}, "lr_scheduler", "linear"),
        (
            {"target_modules": "q_proj"},
            "target_modules",
            r"""^target_modules: all-linear or a list of texts is accepted, such as \["q_proj", "v_proj"\] """
            r"""\(on the command line: --set target_modules='\["q_proj", "v_proj"\]'\)$""",
        ),
        ({"target_modules": [1, 2]}, "target_modules", "^target_modules: all-linear or a list of texts is accepted"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern.q_proj", "integer"),
        ({"target_modules": ["w_proj"]}, "target_modules", "end in q_proj, up_proj"),
    ],
)
def test_a_wrong_setting_is_named(host: PluginHost, config: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        prepare(host, config)
    assert caught.value.reason == "CONFIG_INVALID"
    assert caught.value.violations[0].field.startswith(f"spec.config.{field}")


def test_every_wrong_setting_is_told(host: PluginHost) -> None:
    with pytest.raises(InvalidArgument) as caught:
        prepare(host, {"r": 0, "seed": -1, "x": 1, "y": 1})
    assert {violation.field for violation in caught.value.violations} == {
        "spec.config.r",
        "spec.config.seed",
        "spec.config.x",
        "spec.config.y",
    }
    assert caught.value.message == "4 settings are wrong"
    assert sum("its settings are" in violation.description for violation in caught.value.violations) == 1


def test_an_unknown_strategy_is_not_found(host: PluginHost) -> None:
    with pytest.raises(NotFound, match=r"faulty, full.* lora"):
        prepare(host, {}, strategy="none")
    with pytest.raises(FailedPrecondition, match="broken 2 could not be loaded: ImportError: no"):
        prepare(host, {}, strategy="broken")


def test_what_a_plugin_raises_is_told(host: PluginHost, tmp_path: Path) -> None:
    fault(host, ConfigError("seed", "a bad seed"))
    with pytest.raises(InvalidArgument, match="a bad seed") as invalid:
        prepare(host, {}, strategy="faulty")
    assert invalid.value.violations[0].field == "spec.config.seed"
    fault(host, ArtifactError("a.weight", "a.weight is wrong"))
    with pytest.raises(FailedPrecondition, match=r"a\.weight is wrong") as rejected:
        host.load_deltas(tmp_path, "faulty", BASE)
    assert (rejected.value.reason, rejected.value.violations[0].field) == ("ARTIFACT_REJECTED", "a.weight")
    for raised in (KeyError("x"), SystemExit(1), RecursionError()):
        fault(host, raised)
        with pytest.raises(FailedPrecondition, match=f"'faulty' failed in load: {type(raised).__name__}") as failed:
            host.load_deltas(tmp_path, "faulty", BASE)
        assert failed.value.reason == "PLUGIN_FAILED"
    fault(host, MemoryError())
    with pytest.raises(MemoryError):
        host.load_deltas(tmp_path, "faulty", BASE)


def test_what_a_plugin_returns_is_checked(host: PluginHost, tmp_path: Path) -> None:
    fault(host, None, [])
    with pytest.raises(FailedPrecondition, match="changes nothing"):
        host.load_deltas(tmp_path, "faulty", BASE)
    fault(host, None, [{"module": "q_proj"}])
    with pytest.raises(FailedPrecondition, match="returned dict, which is no delta"):
        host.load_deltas(tmp_path, "faulty", BASE)


def test_an_unknown_artifact_is_told_what_would_be_known(host: PluginHost, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(FailedPrecondition, match=r"adapter_model\.bin.*lora: adapter_config\.json") as caught:
        host.identify(tmp_path)
    assert caught.value.reason == "ARTIFACT_NOT_RECOGNISED"
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert host.identify(tmp_path) == "lora"
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(FailedPrecondition, match="JSON object") as damaged:
        host.identify(tmp_path)
    assert damaged.value.reason == "ARTIFACT_REJECTED"
