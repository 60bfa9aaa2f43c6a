"""StrategyBattery: the tests that every strategy must pass."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError

from graftwork_plugins import BaseModelHandle, DatasetInfo, DeviceInfo, Strategy, Trainable, TrainingRow
from graftwork_plugins.testing.memory import PeakResidentMemory
from graftwork_plugins.testing.models import base_handle, logits_of, make_model
from graftwork_plugins.testing.serving import apply_deltas, write_artifact
from graftwork_plugins.testing.training import make_rows, train_steps

_PICKLE_OR_ZIP = (b"\x80", b"PK", b"\x1f\x8b")


class StrategyBattery:
    """What every strategy that can train and serve must show. Override the attributes to fit yours."""

    strategy: ClassVar[Strategy]
    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of Config that the tests use; defaults elsewhere."""
    learning_rate: ClassVar[float] = 0.01
    """High enough for `loss falls` within 30 steps on the toy model."""
    tolerance: ClassVar[float] = 1e-4
    """Largest difference of logits that counts as equal, float32."""
    quantization: ClassVar[str] = "none"
    """What the base says of its linear layers, for a strategy that wants them quantised. The model here is not."""

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """Small models are faster on one thread, and much faster where tests run side by side."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def config(self, **settings: Any) -> Any:
        """The settings the tests use."""
        return self.strategy.Config.model_validate({**self.settings, **settings})

    def model(self) -> torch.nn.Module:
        """A fresh base model, always the same."""
        return make_model()

    def built(self, **settings: Any) -> tuple[BaseModelHandle, Trainable]:
        """A base and what `build` makes of it, seeded as the host does."""
        base = base_handle(self.model(), self.quantization)
        torch.manual_seed(11)
        return base, self.strategy.build(base, self.config(**settings))

    def test_config_survives_json(self) -> None:
        """Settings go to JSON and back, and each has a description."""
        config = self.config()
        again = self.strategy.Config.model_validate(json.loads(config.model_dump_json()))
        assert again == config
        for name, schema in self.strategy.Config.model_json_schema()["properties"].items():
            assert schema.get("description"), f"setting {name} has no description"

    def test_unknown_settings_are_refused(self) -> None:
        """A misspelt key is an error."""
        with pytest.raises(ValidationError, match="no_such_setting"):
            self.config(no_such_setting=1)

    def test_own_settings_fit_the_base(self) -> None:
        """`validate` accepts what the tests use."""
        self.strategy.validate(self.config(), base_handle(self.model(), self.quantization).info)

    def test_a_fresh_variant_equals_the_base(self) -> None:
        """Before the first step, the logits are the base's."""
        expected = logits_of(self.model())
        _, trainable = self.built()
        assert torch.allclose(logits_of(trainable.model), expected, atol=self.tolerance, rtol=0)

    def test_the_same_seed_builds_the_same(self) -> None:
        """`build` is a function of seed and settings."""
        first, second = self.built()[1].parameters, self.built()[1].parameters
        assert list(first) == list(second)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_only_declared_parameters_train(self) -> None:
        """What trains is what `parameters` says."""
        _, trainable = self.built()
        declared = {id(parameter) for parameter in trainable.parameters.values()}
        learning = {id(parameter) for parameter in trainable.model.parameters() if parameter.requires_grad}
        assert learning == declared
        before = {name: parameter.detach().clone() for name, parameter in trainable.model.named_parameters()}
        train_steps(self.strategy, trainable, make_rows(), 2, self.learning_rate)
        changed = {
            id(parameter)
            for name, parameter in trainable.model.named_parameters()
            if not torch.equal(parameter, before[name])
        }
        assert changed, "training changed nothing"
        assert changed <= declared

    def test_the_base_weights_stay_untouched(self) -> None:
        """Nothing is written into the resident weights: in the tuner they are mapped from the server's memory."""
        model = self.model()
        originals = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        torch.manual_seed(11)
        trainable = self.strategy.build(base_handle(model, self.quantization), self.config())
        train_steps(self.strategy, trainable, make_rows(), 2, self.learning_rate)
        assert all(torch.equal(parameter, original) for parameter, original in originals)

    def test_the_loss_falls(self) -> None:
        """Thirty steps learn something."""
        _, trainable = self.built()
        losses = train_steps(self.strategy, trainable, make_rows(), 30, self.learning_rate)
        assert losses[-1] < 0.7 * losses[0]

    def test_what_is_served_equals_what_was_trained(self, tmp_path: Path) -> None:
        """`save`, then `load`, then the deltas give the trained logits."""
        base, trainable = self.built()
        train_steps(self.strategy, trainable, make_rows(), 5, self.learning_rate)
        trained = logits_of(trainable.model)
        artifact = write_artifact(self.strategy.save(trainable), tmp_path / "artifact")
        served = self.model()
        assert not torch.allclose(logits_of(served), trained, atol=10 * self.tolerance, rtol=0)
        apply_deltas(served, self.strategy.load(artifact, base.info))
        assert torch.allclose(logits_of(served), trained, atol=self.tolerance, rtol=0)

    def test_nothing_is_pickled(self, tmp_path: Path) -> None:
        """The files are safetensors and JSON."""
        _, trainable = self.built()
        artifact = write_artifact(self.strategy.save(trainable), tmp_path / "artifact")
        assert artifact.names()
        for name in artifact.names():
            assert name.endswith((".safetensors", ".json"))
            assert not (artifact.path / name).read_bytes().startswith(_PICKLE_OR_ZIP)

    @pytest.mark.parametrize("tokens", [64, 1024])
    def test_the_estimate_bounds_the_measurement(self, tmp_path: Path, tokens: int) -> None:
        """The number of parameters is exact; memory and artifact are not above the estimate."""
        vocabulary = 2048
        # Warm-up: what libraries allocate once is the host's to count.
        train_steps(self.strategy, self.built()[1], make_rows(), 1, 0.0)
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": vocabulary}
        base = base_handle(make_model(**sizes), self.quantization)
        weights = list(base.model.parameters())  # stay resident, as the server's do
        config = self.config(micro_batch_tokens=tokens)
        device = DeviceInfo(type="cpu", total_memory_bytes=2**34, threads=torch.get_num_threads())
        dataset = DatasetInfo(row_count=8, total_tokens=tokens)
        estimate = self.strategy.estimate(config, base.info, dataset, device)
        rows = [TrainingRow(row.input_ids, row.input_ids) for row in make_rows(8, tokens // 8, vocabulary)]
        with PeakResidentMemory() as peak:
            trainable = self.strategy.build(base, config)
            train_steps(self.strategy, trainable, rows, 2, 1e-4)
            saved = self.strategy.save(trainable)
        artifact = write_artifact(saved, tmp_path / "artifact")
        trained = sum(parameter.numel() for parameter in trainable.parameters.values())
        assert estimate.trained_parameters == trained
        assert sum((artifact.path / name).stat().st_size for name in artifact.names()) <= estimate.artifact_bytes
        resident = sum(weight.nbytes for weight in weights)
        print(f"measured {peak.bytes:,} of estimated {estimate.memory_bytes:,} bytes, over {resident:,} of weights")
        assert peak.bytes <= estimate.memory_bytes
