"""The Strategy base class and the frozen types that it takes and gives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from graftwork_plugins.batches import IGNORED_LABEL, PackedBatch, TrainingRow
from graftwork_plugins.deltas import Delta
from graftwork_plugins.documents import read_json

if TYPE_CHECKING:
    import torch

API_VERSION = 1
"""Version of this contract. A strategy written for another one is listed with a load error and never used."""

Capability = Literal["train", "serve", "merge", "export"]


class ConfigError(ValueError):
    """A setting does not fit: names the setting, says what is wrong and what would be accepted."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class ArtifactError(ValueError):
    """An artifact cannot be served: names the tensor or key, says what is wrong and what would be accepted."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.message = message


class UnsupportedBase(ValueError):
    """A strategy cannot train on this base, whatever the settings: says why, and what base or strategy would do."""


@dataclass(frozen=True, kw_only=True)
class BaseInfo:
    """The base model, without its weights."""

    fingerprint: str
    architecture: str
    """transformers class name"""
    config: Mapping[str, Any]
    """the transformers configuration as JSON"""
    linear_modules: Mapping[str, tuple[int, int]]
    """linear layers by dotted name: (in_features, out_features). GPT-2's Conv1D layers are among them."""
    output_module: str | None
    """name of the linear layer that makes the logits, None if there is none among linear_modules"""
    parameter_count: int
    weight_bytes: int
    dtype: str
    embedding_modules: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """embedding layers by dotted name: (number of embeddings, their size)"""
    input_module: str | None = None
    """name of the embedding that the tokens go through"""
    tied_modules: Sequence[str] = ()
    """modules whose weight is the input embedding's own: the output layer, where they are tied"""
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """shapes of all parameters by dotted name, a tied one under each of its names; those of quantised layers as they
    are in the checkpoint"""
    quantization: str = "none"
    """of the linear layers: none, nf4 or int8. The parameters of quantised ones hold codes, and the layers are called
    as ever; gradients flow through them to what comes before."""
    trunk: str = ""
    """name of the module that answers with the last hidden states; "" if it is the model itself"""
    trunk_name: str = ""
    """the name that transformers gives the trunk in models with a head: "model", "transformer", "bert"; with it before
    them, the names of an encoder's modules are those of its ForSequenceClassification's"""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A data set, without its rows."""

    row_count: int
    total_tokens: int
    """tokens of one epoch"""


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """Where training runs."""

    type: Literal["cpu", "cuda"]
    total_memory_bytes: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job will take. Bytes come on top of the resident base weights; the measurement must not exceed them."""

    trained_parameters: int
    memory_bytes: int
    artifact_bytes: int


@dataclass(frozen=True)
class BaseModelHandle:
    """The resident base model inside the tuner's process."""

    info: BaseInfo
    model: torch.nn.Module
    """The transformers model. Its parameters ARE the server's resident weights, frozen, mapped copy-on-write: clone
    before changing one."""
    device: torch.device


@dataclass
class Trainable:
    """What `build` makes: the model to run, and the parameters to train (exactly those with requires_grad)."""

    model: torch.nn.Module
    parameters: Mapping[str, torch.nn.Parameter]
    """By name. Their names key the checkpoints, so the same config must give the same names."""
    notes: Sequence[str] = ()
    """Told to the client as job messages."""


@dataclass(frozen=True, kw_only=True)
class SavedArtifact:
    """What `save` makes. The host writes the files, atomically, as safetensors and JSON."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    """By file name ("*.safetensors"), then by tensor name; contiguous, on CPU."""
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """JSON documents by file name ("*.json")."""
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    """Header metadata of the safetensors files."""


@dataclass(frozen=True)
class Artifact:
    """The files of a version, for reading."""

    path: Path

    def names(self) -> list[str]:
        """File names, sorted."""
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_file())

    def json(self, name: str) -> dict[str, Any]:
        """A JSON document. Raises ArtifactError if it is missing, no JSON object, or over 16 MiB."""
        path = self.path / name
        if not path.is_file():
            raise ArtifactError(name, f"{name} is missing; the files are {', '.join(self.names()) or 'none'}")
        if path.stat().st_size > 16 * 1024 * 1024:
            raise ArtifactError(name, f"{name} is over 16 MiB")
        try:
            document = read_json(path.read_bytes(), constants=True)  # transformers writes them
        except ValueError as error:
            raise ArtifactError(name, f"{name} is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise ArtifactError(name, f"{name} must hold a JSON object")
        return document

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a safetensors file, mapped from disk, on CPU; those of 8-bit floats as bfloat16, which holds
        their values exactly and can be computed with. Raises ArtifactError if it cannot be read."""
        from safetensors import SafetensorError, safe_open

        path = self.path / name
        if not path.is_file():
            raise ArtifactError(name, f"{name} is missing; the files are {', '.join(self.names()) or 'none'}")
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                slices = {key: handle.get_slice(key) for key in handle.offset_keys()}
                dtypes = {part.get_dtype() for part in slices.values()}
                if len(dtypes) == 1:
                    # get_tensor takes 10 us: an adapter's hundreds of tensors are cut out of one.
                    shapes = {key: part.get_shape() for key, part in slices.items()}
                    if (tensors := _of_one_dtype(path, dtypes.pop(), shapes)) is not None:
                        return tensors
                return {key: _computable(handle.get_tensor(key)) for key in slices}
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(name, f"{name} is no whole safetensors file: {error}") from None


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _of_one_dtype(path: Path, dtype: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor] | None:
    """The tensors of a safetensors file, `shapes` in the order of the file; the format leaves no gap between them. None
    for a dtype that needs more than a cast, or data that do not begin at a multiple of its size."""
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if dtype not in kinds:
        return None
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    size = kinds[dtype].itemsize
    if begin % size:
        return None
    elements = [math.prod(shape) for shape in shapes.values()]
    mapped = torch.from_file(str(path), shared=False, size=begin + size * sum(elements), dtype=torch.uint8)
    pieces = mapped[begin:].view(kinds[dtype]).split(elements)
    return {key: piece.view(shape) for (key, shape), piece in zip(shapes.items(), pieces, strict=True)}


class TrainingConfig(BaseModel):
    """Settings that every strategy's training has. Strategies inherit from it and change defaults as they need."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(1e-4, gt=0, le=10, description="Peak learning rate of AdamW.")
    num_epochs: float = Field(3.0, gt=0, le=10_000, description="Passes over the data; max_steps wins if it is set.")
    max_steps: int = Field(0, ge=0, le=10_000_000, description="Optimizer steps in all; 0: as num_epochs says.")
    batch_size: int = Field(16, ge=1, le=65_536, description="Rows in one optimizer step.")
    micro_batch_tokens: int = Field(
        2048, ge=1, le=1_048_576, description="Most tokens in one forward and backward; a longer row goes alone."
    )
    max_sequence_tokens: int = Field(0, ge=0, description="Rows are cut to this many tokens; 0: the base's context.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Course of the learning rate after the warm-up: to 0 for linear and cosine."
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta2.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0: they are not.")
    seed: int = Field(42, ge=0, lt=2**63, description="Seed of initialisation, dropout and the order of the rows.")
    eval_steps: int = Field(0, ge=0, description="Measure held-out loss every so many steps; 0: after each epoch.")
    early_stopping_patience: int = Field(
        0, ge=0, description="Stop after so many held-out losses in a row that are worse than the lowest; 0: never."
    )
    published_weights: Literal["last", "best"] = Field(
        "last", description="Publish the last weights, or the best by held-out loss."
    )
    checkpoint_steps: int = Field(50, ge=0, description="Make a checkpoint every so many steps; 0: none.")

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("a number is accepted, not true or false")
        return value


class Strategy(ABC):
    """How one family of variants is trained, stored and served.

    The host calls `validate` and `estimate` when a job is created, `build`, `collate`, `loss` and `save` in the tuner
    process, `load` in the engine process off the token loop. An instance must keep no state between calls.
    """

    id: ClassVar[str]
    """1 to 64 of a-z, 0-9, '-', '_'; unique among the plugins."""
    version: ClassVar[str]
    api: ClassVar[int] = API_VERSION
    description: ClassVar[str] = ""
    artifact_files: ClassVar[str] = ""
    """Which files its graftwork_identify_artifact recognises, in words, for those who upload something else."""
    capabilities: ClassVar[frozenset[Capability]] = frozenset({"train", "serve"})
    Config: ClassVar[type[TrainingConfig]] = TrainingConfig
    """Settings; unknown keys are refused, and its JSON schema is what clients see."""

    def validate(self, config: Any, base: BaseInfo) -> None:  # noqa: B027 - a default, not an abstract method
        """Raises ConfigError if `config` (an instance of Config) does not fit this base, UnsupportedBase if no settings
        would."""

    @abstractmethod
    def estimate(self, config: Any, base: BaseInfo, dataset: DatasetInfo, device: DeviceInfo) -> Estimate:
        """What training will take, as an upper bound."""

    @abstractmethod
    def build(self, base: BaseModelHandle, config: Any) -> Trainable:
        """The model to train. Called after seeding, so that the same config gives the same initial parameters."""

    @abstractmethod
    def save(self, trainable: Trainable) -> SavedArtifact:
        """The trained variant as named tensors and documents."""

    @abstractmethod
    def load(self, artifact: Artifact, base: BaseInfo) -> Sequence[Delta]:
        """The deltas of an artifact. Raises ArtifactError naming the tensor or key that cannot be served.

        The engine then checks that every delta binds to the base, shapes and finiteness included.
        """

    def collate(self, rows: Sequence[TrainingRow], device: torch.device) -> PackedBatch:
        """Rows packed into one batch, in the order given."""
        import torch

        input_ids: list[int] = []
        labels: list[int] = []
        position_ids: list[int] = []
        cu_seqlens = [0]
        for row in rows:
            input_ids.extend(row.input_ids)
            labels.extend([IGNORED_LABEL, *row.labels[1:]])
            position_ids.extend(range(len(row.input_ids)))
            cu_seqlens.append(len(input_ids))

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor([values], dtype=torch.int64, device=device)

        return PackedBatch(tensor(input_ids), tensor(position_ids), tensor(labels), cu_seqlens)

    def loss(self, trainable: Trainable, batch: PackedBatch) -> torch.Tensor:
        """Sum of the cross entropy over the tokens that carry loss (float32 scalar); the host divides by their number
        in the whole step, so that gradient accumulation does not change the result.

        Only positions whose next token carries loss go through the output layer.
        """
        import torch

        # Position i predicts token i + 1; the first token of a row is IGNORED_LABEL, so no row predicts into the next.
        targets = batch.labels[0, 1:]  # [tokens - 1]
        keep = torch.nonzero(targets != IGNORED_LABEL).squeeze(1)
        output = trainable.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, logits_to_keep=keep
        )
        logits = output.logits[0].float()  # [kept, vocabulary]
        return torch.nn.functional.cross_entropy(logits, targets[keep], reduction="sum")
