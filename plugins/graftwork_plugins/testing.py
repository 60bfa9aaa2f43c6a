"""A kit to prove a strategy: subclass StrategyBattery, name the strategy, run pytest.

    from graftwork_plugins.testing import StrategyBattery
    from my_strategy import MyStrategy

    class TestMyStrategy(StrategyBattery):
        strategy = MyStrategy()

Needs torch, transformers and pytest. Every model is small, random and made here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from graftwork_plugins import (
    IGNORED_LABEL,
    Artifact,
    BaseInfo,
    BaseModelHandle,
    DatasetInfo,
    Delta,
    DeviceInfo,
    FullWeights,
    LowRank,
    Replace,
    SavedArtifact,
    Scale,
    Strategy,
    Trainable,
    TrainingRow,
)

_CPU = torch.device("cpu")
_PROBE = [[5, 9, 2, 40, 7, 1, 33], [8, 3, 3, 21]]
_PICKLE_OR_ZIP = (b"\x80", b"PK", b"\x1f\x8b")


def make_model(**sizes: Any) -> torch.nn.Module:
    """A random Llama in float32, frozen, in evaluation mode; the same one for the same sizes."""
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LlamaForCausalLM(LlamaConfig(**settings | sizes)).eval().requires_grad_(False)


def base_handle(model: torch.nn.Module, quantization: str = "none") -> BaseModelHandle:
    """`model` as a strategy gets it. `quantization`: what the base says of its linear layers."""
    any_model: Any = model
    output = any_model.get_output_embeddings()
    embedding = any_model.get_input_embeddings()
    linear: dict[str, tuple[int, int]] = {}
    embeddings: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            linear[name] = (module.weight.shape[0], module.weight.shape[1])
        elif isinstance(module, torch.nn.Linear):
            linear[name] = (module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Embedding):
            embeddings[name] = (module.num_embeddings, module.embedding_dim)
    names = {module: name for name, module in model.named_modules()}
    tied = [
        n for n, m in model.named_modules() if getattr(m, "weight", None) is embedding.weight and m is not embedding
    ]
    parameters = list(model.parameters())
    info = BaseInfo(
        fingerprint="sha256:kit",
        architecture=type(model).__name__,
        config=any_model.config.to_dict(),
        linear_modules=linear,
        output_module=names.get(output),
        parameter_count=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        embedding_modules=embeddings,
        input_module=names[embedding],
        tied_modules=tied,
        parameters={n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)},
        quantization=quantization,
    )
    return BaseModelHandle(info, model, _CPU)


def make_rows(count: int = 8, length: int = 12, vocabulary: int = 64) -> list[TrainingRow]:
    """Rows with a regularity to learn; the first third of each carries no loss."""
    rows = []
    for index in range(count):
        ids = [(3 * index + 5 * position) % vocabulary for position in range(length)]
        prompt = length // 3
        rows.append(TrainingRow(ids, [IGNORED_LABEL] * prompt + ids[prompt:]))
    return rows


def train_steps(
    strategy: Strategy, trainable: Trainable, rows: Sequence[TrainingRow], steps: int, learning_rate: float
) -> list[float]:
    """A plain AdamW loop over one batch of `rows`; the mean loss per token of each step."""
    optimizer = torch.optim.AdamW(list(trainable.parameters.values()), lr=learning_rate, weight_decay=0.0)
    carrying = sum(label != IGNORED_LABEL for row in rows for label in row.labels[1:])
    losses: list[float] = []
    for _ in range(steps):
        loss = strategy.loss(trainable, strategy.collate(rows, _CPU)) / carrying
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits of two short prompts, one after another: [tokens, vocabulary]. Dropout is off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in _PROBE]
    for module in training:
        module.training = True
    return torch.cat(logits)


@torch.no_grad()
def apply_deltas(model: torch.nn.Module, deltas: Sequence[Delta]) -> None:
    """Changes `model` as the engine would serve it with `deltas`: the reference that engines are compared with.

    For every kind but Prefix, which is no change of modules, and stacked experts.
    """
    # What other deltas compute from the base's weights must not see them replaced.
    for delta in sorted(deltas, key=lambda delta: isinstance(delta, Replace)):
        if isinstance(delta, FullWeights):
            state = model.state_dict()
            for name, tensor in delta.tensors.items():
                state[name].copy_(tensor)
        elif isinstance(delta, LowRank) and delta.parameter is None:
            # Beside the weight, not in it: a tied weight is the embedding too.
            module = model.get_submodule(delta.module)
            module.register_forward_hook(_update_of(delta, module))
        elif isinstance(delta, Scale):
            _scale(model.get_submodule(delta.module), delta)
        elif isinstance(delta, Replace):
            _replace(model.get_submodule(delta.module), delta)
        else:
            raise NotImplementedError(f"the kit does not apply {type(delta).__name__} deltas of this form")


def _update_of(delta: LowRank, module: torch.nn.Module) -> Any:
    a, b = delta.a.float(), delta.b.float()
    factor: torch.Tensor | None = None
    if delta.magnitude is not None:
        weight: Any = module.weight
        matrix = weight.t() if isinstance(module, Conv1D | torch.nn.Embedding) else weight
        factor = delta.magnitude.float() / (matrix.float() + delta.scaling * b @ a).norm(dim=1)

    def add_update(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        is_embedding = isinstance(module, torch.nn.Embedding)
        product = a.t()[inputs[0]] if is_embedding else inputs[0].float() @ a.t()  # [..., rank]
        update = delta.scaling * product @ b.t()
        if is_embedding:
            update = update * getattr(module, "embed_scale", 1.0)
        if delta.bias is not None:
            update = update + delta.scaling * delta.bias.float()
        if factor is None:
            return output + update.to(output.dtype)
        bias = getattr(module, "bias", None)
        bias = 0.0 if bias is None else bias
        return (factor * (output.float() - bias + update) + bias).to(output.dtype)

    return add_update


def _scale(module: torch.nn.Module, delta: Scale) -> None:
    factors = delta.factors.float()
    if delta.of == "input":
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factors.to(inputs[0].dtype),))
    else:
        module.register_forward_hook(lambda module, inputs, output: output * factors.to(output.dtype))


def _replace(module: torch.nn.Module, delta: Replace) -> None:
    for name, tensor in delta.tensors.items():
        old = module._parameters[name]
        assert old is not None, f"{delta.module} has no {name}"
        if delta.copy_of_base:
            assert torch.equal(tensor.to(old), old), f"{delta.module}.{name} is no copy of the base's"
            continue
        new = old.detach().clone()
        new[torch.tensor(delta.rows) if delta.rows is not None else ...] = tensor.to(new)
        # A parameter of its own: a tied one keeps its value elsewhere.
        module._parameters[name] = torch.nn.Parameter(new, requires_grad=False)


def write_artifact(saved: SavedArtifact, folder: Path) -> Artifact:
    """Writes what `save` returned as the host does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in saved.tensors.items():
        save_file(dict(tensors), folder / name, metadata=dict(saved.metadata))
    for name, document in saved.documents.items():
        (folder / name).write_text(json.dumps(document, allow_nan=False))
    return Artifact(folder)


class PeakResidentMemory:
    """Bytes by which this process grew at most within the block; skips the test where Linux does not tell."""

    bytes = 0

    def __enter__(self) -> PeakResidentMemory:
        gc.collect()
        with contextlib.suppress(AttributeError):
            # glibc keeps what was freed; memory used again would not show as growth.
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        except OSError:
            pytest.skip("this system does not tell a process's peak memory")
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = _status("VmHWM") - self._before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


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
        config = self.config()
        again = self.strategy.Config.model_validate(json.loads(config.model_dump_json()))
        assert again == config
        for name, schema in self.strategy.Config.model_json_schema()["properties"].items():
            assert schema.get("description"), f"setting {name} has no description"

    def test_unknown_settings_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="no_such_setting"):
            self.config(no_such_setting=1)

    def test_own_settings_fit_the_base(self) -> None:
        self.strategy.validate(self.config(), base_handle(self.model(), self.quantization).info)

    def test_a_fresh_variant_equals_the_base(self) -> None:
        expected = logits_of(self.model())
        _, trainable = self.built()
        assert torch.allclose(logits_of(trainable.model), expected, atol=self.tolerance, rtol=0)

    def test_the_same_seed_builds_the_same(self) -> None:
        first, second = self.built()[1].parameters, self.built()[1].parameters
        assert list(first) == list(second)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_only_declared_parameters_train(self) -> None:
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
        # In the tuner they are mapped from the server's memory.
        model = self.model()
        originals = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        torch.manual_seed(11)
        trainable = self.strategy.build(base_handle(model, self.quantization), self.config())
        train_steps(self.strategy, trainable, make_rows(), 2, self.learning_rate)
        assert all(torch.equal(parameter, original) for parameter, original in originals)

    def test_the_loss_falls(self) -> None:
        _, trainable = self.built()
        losses = train_steps(self.strategy, trainable, make_rows(), 30, self.learning_rate)
        assert losses[-1] < 0.7 * losses[0]

    def test_what_is_served_equals_what_was_trained(self, tmp_path: Path) -> None:
        base, trainable = self.built()
        train_steps(self.strategy, trainable, make_rows(), 5, self.learning_rate)
        trained = logits_of(trainable.model)
        artifact = write_artifact(self.strategy.save(trainable), tmp_path / "artifact")
        served = self.model()
        assert not torch.allclose(logits_of(served), trained, atol=10 * self.tolerance, rtol=0)
        apply_deltas(served, self.strategy.load(artifact, base.info))
        assert torch.allclose(logits_of(served), trained, atol=self.tolerance, rtol=0)

    def test_nothing_is_pickled(self, tmp_path: Path) -> None:
        _, trainable = self.built()
        artifact = write_artifact(self.strategy.save(trainable), tmp_path / "artifact")
        assert artifact.names()
        for name in artifact.names():
            assert name.endswith((".safetensors", ".json"))
            assert not (artifact.path / name).read_bytes().startswith(_PICKLE_OR_ZIP)

    @pytest.mark.parametrize("tokens", [64, 1024])
    def test_the_estimate_bounds_the_measurement(self, tmp_path: Path, tokens: int) -> None:
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
