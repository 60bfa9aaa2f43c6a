"""The nouns that areas share. No torch, no gRPC, no database here, so every process can import them."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from graftwork_server.errors import FailedPrecondition


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The base model as the engine loaded it."""

    fingerprint: str
    """sha256 over the configuration and the weights' names, shapes, dtypes and bytes sampled; "sha256:..."."""
    source: str
    """The directory that it was read from."""
    architecture: str
    """transformers class name, such as LlamaForCausalLM."""
    model_type: str
    dtype: str
    device: str
    vocab_size: int
    context_tokens: int
    """Prompt and completion together."""
    parameter_count: int
    weight_bytes: int
    eos_token_ids: list[int]
    tokenizer_dir: str | None
    """Directory with tokenizer.json and tokenizer_config.json, perhaps a chat template; None: only token ids work."""
    kv_tokens: int
    """Tokens that fit the KV cache at once; 0 for an encoder, which has none."""
    max_sequences: int
    """Sequences that are decoded together."""
    quantization: str = "none"
    """Of the linear layers: none, nf4 or int8. weight_bytes counts them as they are; the fingerprint does not tell."""
    generates: bool = True
    """False for an encoder: it answers Classify and Embed alone."""
    hidden_size: int = 0
    default_pooling: str = "last"
    """Of Embed: one of POOLINGS of base/sentence_files.py, or several joined by "+"."""
    undone_pooling: str = ""
    """What the model's files ask of Embed and it does not do: it then asks the client to name a pooling."""


class StrategyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A strategy, or a plugin that failed to load (`load_error` not empty)."""

    id: str
    version: str = ""
    api_version: int = 0
    distribution: str = ""
    description: str = ""
    capabilities: list[str] = []
    config_json_schema: str = ""
    load_error: str = ""


class AdapterRef(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to serve a version: its identity, where its files lie, and who reads them."""

    digest: str
    path: str
    strategy: str
    name: str = ""
    """Resource name of a version with these files, for people."""
    end_token_ids: list[int] = []
    """Tokens that end its texts beside those of the base model."""


class ArtifactInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine found when it read an artifact without loading it."""

    strategy: str
    parameter_count: int
    rank: int
    modules_bound: int


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a load bound; see adapters.proto."""

    modules_bound: int
    rank: int
    device_bytes: int
    load_ms: float
    already_loaded: bool = False


class JobState(enum.StrEnum):
    """Life of a tuning job; the last three are final."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        """True if no further state follows."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class DatasetFormat(enum.StrEnum):
    """Form of a data set's rows; see tuning.proto."""

    CHAT = "CHAT"
    PROMPT_COMPLETION = "PROMPT_COMPLETION"
    INSTRUCTION = "INSTRUCTION"
    TEXT = "TEXT"


class TuningEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is expected to take, said before it starts. Bytes come on top of the resident base weights."""

    trained_parameters: int
    memory_bytes: int
    artifact_bytes: int
    total_steps: int


class SettingChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Where a setting of a job comes from."""

    key: str
    value: Any
    reason: str
    automatic: bool = True
    """Chosen by the server; false: by who created the job."""


class TuningProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step; see tuning.proto."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    eta_ms: int
    seen_tokens: int


class TuningResult(msgspec.Struct, frozen=True, kw_only=True):
    """What training left behind, as the tuner reports it; the front adds the published version."""

    trained_parameters: int
    peak_memory_bytes: int
    artifact_bytes: int
    train_ms: int
    final_loss: float
    validation_loss: float | None = None
    """Of the published weights."""
    published_step: int = 0
    """Optimizer steps after which the weights were as they are published; 0: not known, by an older version."""
    end_token_ids: list[int] = []
    """Tokens that end the rows it learned; none where no row has such an end."""


def require_generation(model: ModelInfo, what: str) -> None:
    """Raises FailedPrecondition (BASE_IS_ENCODER) unless the base generates; `what` was asked for: "Generate"."""
    if not model.generates:
        raise FailedPrecondition(
            f"the base model is {model.architecture}, an encoder, which {what} cannot use; Classify (with a base or "
            "adapter that has a head), Embed and Tokenize can",
            reason="BASE_IS_ENCODER",
        )
