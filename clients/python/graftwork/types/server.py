"""The server itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from graftwork.types.tuning import TuningJobInfo


@dataclass(frozen=True)
class BaseModelInfo:
    """The base model of a server; see ServerInfo. context_tokens: what one sequence can have, prompt and completion."""

    display_name: str
    fingerprint: str
    architecture: str
    dtype: str
    device: str
    quantization: str
    parameter_count: int
    weight_bytes: int
    context_tokens: int
    vocab_size: int
    generates: bool
    has_tokenizer: bool


@dataclass(frozen=True)
class ServerLimits:
    """What a server takes at most: sequences decoded together, and that wait or run; tokens of a step and of the KV
    cache; bytes of an adapter upload and of a data set; tuning jobs at once."""

    max_sequences: int
    max_queue: int
    max_step_tokens: int
    kv_cache_tokens: int
    max_upload_bytes: int
    max_dataset_bytes: int
    max_concurrent_jobs: int


@dataclass(frozen=True)
class ServerInfo:
    """A server at one moment.

    versions: of what it runs on, by name. engine_ready: False while a dead engine is started again. loaded_versions:
    names of the versions on the device. sequence_count: sequences that wait or run. jobs: the first 100 that have not
    ended, job_count counts them all.
    """

    version: str
    versions: Mapping[str, str]
    start_time: datetime | None
    engine_ready: bool
    base_model: BaseModelInfo
    limits: ServerLimits
    loaded_versions: tuple[str, ...]
    adapter_count: int
    sequence_count: int
    jobs: tuple[TuningJobInfo, ...]
    job_count: int
