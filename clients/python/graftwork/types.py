"""What the client returns: frozen, plain values without protobuf in them. Times are UTC; logarithms are natural."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

FinishReason: TypeAlias = Literal["stop", "length"]
Pooling: TypeAlias = Literal["mean", "cls", "last", "max", "mean_sqrt_len", "weightedmean"]
AnsweredPooling: TypeAlias = Pooling | Literal["several"]
"""several: their vectors one after another, as the base model's files say."""
ProblemType: TypeAlias = Literal["single_label", "multi_label", "regression"]
JobState: TypeAlias = Literal["unspecified", "pending", "running", "paused", "succeeded", "failed", "cancelled"]
DatasetForm: TypeAlias = Literal["unspecified", "chat", "prompt_completion", "instruction", "text"]
EventKind: TypeAlias = Literal["state", "progress", "evaluation", "checkpoint", "message", "unknown"]


class Message(TypedDict):
    """One message of a conversation: role is "system", "user" or "assistant", or another that the template knows.

    content: a text, or a list of parts {"type": "text", "text": ...}, which are joined as they are.
    tool_calls: what the assistant called, as the template reads it. tool_call_id: the call that a message answers.
    name: who speaks, such as a tool.
    """

    role: str
    content: str | Sequence[Mapping[str, Any]]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class TopLogprob:
    """One alternative at a position; logprob is the natural logarithm of its probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log probability under the model's own distribution (temperature 1).

    logprob is None for the first token of a scored text, which nothing precedes. top holds the most likely tokens at
    this position, best first, as many as were asked for.
    """

    token_id: int
    text: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of one request; completion_tokens includes the end-of-sequence token.

    cached_tokens: those of the prompt that the server had computed before; with n or best_of, for the first completion.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class GenerationChunk:
    """One piece of a streamed generation.

    text is what became certain with this piece; a completion's pieces together are its whole text. logprobs has one
    entry per token of this piece if asked for. finish_reason is set on a completion's last piece, usage on the stream's
    last one. model and version say who answers (version 0: the base model). index: which completion of several this
    belongs to. score: with best_of, the mean log probability of its tokens, on its last piece. prompt_logprobs: of the
    prompt's tokens, on one piece, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    usage: Usage | None
    model: str
    version: int
    index: int = 0
    score: float | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One of the completions of a request.

    finish_reason: "stop" (end-of-sequence or stop token, stop text, the end of a grammar) or "length" (max_tokens).
    logprobs: one entry per token, None if not asked for. score: with best_of, the mean log probability of its tokens.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    score: float | None


@dataclass(frozen=True)
class Generation:
    """A whole generation.

    text, token_ids, finish_reason and logprobs are those of the first completion; completions has all n of them, with
    best_of the best first. prompt_logprobs: one entry per prompt token, None if not asked for. model and version: who
    answered (version 0: the base model).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    usage: Usage
    model: str
    version: int
    completions: tuple[Completion, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Score:
    """Log probability of every token of a text, and their sum."""

    tokens: tuple[TokenLogprob, ...]
    total_logprob: float
    model: str
    version: int


@dataclass(frozen=True)
class LabelScore:
    """One label for one text; probability is None where the head says values (problem_type "regression")."""

    label: str
    logit: float
    probability: float | None


@dataclass(frozen=True)
class Classification:
    """The labels of one text, in the order of the head's outputs.

    predicted_label: the one with the highest logit, "" for problem_type "regression". input_tokens: tokens of the text.
    """

    labels: tuple[LabelScore, ...]
    predicted_label: str
    input_tokens: int


@dataclass(frozen=True)
class ClassificationResult:
    """One Classification for each input, in their order. model and version: who answered (version 0: the base model).

    problem_type: "single_label" (probabilities are the softmax of the logits), "multi_label" (the sigmoid of each), or
    "regression" (the logits are the values).
    """

    results: tuple[Classification, ...]
    problem_type: ProblemType
    usage: Usage
    model: str
    version: int


@dataclass(frozen=True)
class Embedding:
    """The vector of one text, and the tokens that the text has."""

    values: tuple[float, ...]
    input_tokens: int


@dataclass(frozen=True)
class EmbeddingResult:
    """One Embedding for each input, in their order. pooling: how they were made. model and version: who answered."""

    embeddings: tuple[Embedding, ...]
    pooling: AnsweredPooling
    usage: Usage
    model: str
    version: int


@dataclass(frozen=True)
class Tokenization:
    """Token ids of a text or conversation, each token as text, and how many tokens the base model's context holds."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    context_tokens: int


@dataclass(frozen=True)
class LoadReport:
    """What a load bound: base modules that got a delta, highest rank (0: none), bytes on the device, milliseconds."""

    modules_bound: int
    rank: int
    device_bytes: int
    load_ms: float
    already_loaded: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter and its newest version, or the version that was asked for.

    tuning_job is "" for an uploaded one. load_report is set by create(load=True), load() and pin() only; unpinned by
    unload(): true if that ended a pin. follows_version: the version that the name served before; 0: none.
    """

    name: str
    adapter_id: str
    version: int
    digest: str
    strategy: str
    base_fingerprint: str
    size_bytes: int
    parameter_count: int
    loaded: bool
    create_time: datetime | None
    tuning_job: str
    rank: int
    pinned: bool = False
    load_report: LoadReport | None = None
    unpinned: bool = False
    follows_version: int = 0


@dataclass(frozen=True)
class Strategy:
    """A strategy. config_schema is the JSON schema of its settings; load_error is "" unless it could not be loaded."""

    name: str
    strategy_id: str
    version: str
    api_version: int
    distribution: str
    description: str
    capabilities: tuple[str, ...]
    config_schema: Mapping[str, Any]
    load_error: str


@dataclass(frozen=True)
class Dataset:
    """A stored data set. The same bytes have the same dataset_id."""

    name: str
    dataset_id: str
    display_name: str
    format: DatasetForm
    row_count: int
    size_bytes: int
    create_time: datetime | None


@dataclass(frozen=True)
class LineError:
    """A line (from 1; 0: the data set as a whole) that cannot be used, and what would be accepted."""

    line: int
    reason: str


@dataclass(frozen=True)
class LineErrorKind:
    """Bad lines whose reasons differ in values alone: the first one's reason and line, and how many there are."""

    reason: str
    count: int
    first_line: int


@dataclass(frozen=True)
class DatasetReport:
    """What a check of a data set found.

    errors holds the first 100 bad lines, error_count counts them all; more_errors: those after the first ten, by kind.
    What is wrong in the same way with every row, such as an unknown field, is one error. total_tokens and loss_tokens
    count after rows were cut to the sequence length, longest_row_tokens before. warnings: what a job would do, but
    hardly as meant.
    """

    valid: bool
    format: DatasetForm
    row_count: int
    errors: tuple[LineError, ...]
    error_count: int
    total_tokens: int
    loss_tokens: int
    longest_row_tokens: int
    cut_rows: int
    more_errors: tuple[LineErrorKind, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TuningSpec:
    """What a job tunes, with the strategy's defaults filled in."""

    strategy: str
    dataset: str
    validation_dataset: str
    validation_fraction: float
    adapter_id: str
    config: Mapping[str, Any]
    load: bool
    new_version: bool = False


@dataclass(frozen=True)
class SettingChoice:
    """Where a setting of a job comes from: chosen by the server (automatic) or set by the request, and why."""

    key: str
    value: Any
    reason: str
    automatic: bool


@dataclass(frozen=True)
class TuningProgress:
    """How far a job is: optimizer steps, mean loss per token of the last step, learning rate, training tokens/s."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    eta_ms: int
    seen_tokens: int


@dataclass(frozen=True)
class TuningEvaluation:
    """Mean held-out loss per token after a step."""

    step: int
    loss: float


@dataclass(frozen=True)
class TuningEstimate:
    """What a job is expected to take; memory_bytes comes on top of the resident base weights."""

    trained_parameters: int
    memory_bytes: int
    artifact_bytes: int
    total_steps: int


@dataclass(frozen=True)
class TuningResult:
    """What a job left behind.

    adapter_version is "adapters/{id}/versions/{n}". final_loss is the mean training loss of the last tenth of the
    steps; validation_loss is the published weights', None where no rows are held out; published_step is the step after
    which the weights were as they are published, 0 if the server does not say.
    """

    adapter_version: str
    trained_parameters: int
    peak_memory_bytes: int
    artifact_bytes: int
    train_ms: int
    final_loss: float
    validation_loss: float | None
    published_step: int = 0


@dataclass(frozen=True)
class TuningEvent:
    """Something that happened to a job. sequence counts from 1 without gaps; kind names the one field that is set."""

    sequence: int
    time: datetime | None
    kind: EventKind
    state: JobState | None = None
    progress: TuningProgress | None = None
    evaluation: TuningEvaluation | None = None
    checkpoint_step: int | None = None
    message: str | None = None


@dataclass(frozen=True)
class TuningJobInfo:
    """A tuning job at one moment. result is set once it succeeded, error ("" otherwise) once it failed.

    follows_version: the version that the adapter's name serves before the job's own is published; 0: none.
    """

    name: str
    job_id: str
    spec: TuningSpec
    state: JobState
    progress: TuningProgress | None
    result: TuningResult | None
    error: str
    estimate: TuningEstimate | None
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    validation_loss: float | None
    follows_version: int = 0
    choices: tuple[SettingChoice, ...] = ()
    """Settings that the request set or the server chose; others are the strategy's defaults."""
    error_reason: str = ""
    """The kind of error, such as OUT_OF_MEMORY, once it failed."""

    @property
    def done(self) -> bool:
        """True once the job has ended, however it did."""
        return self.state in ("succeeded", "failed", "cancelled")


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
