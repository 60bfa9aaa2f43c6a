"""Protobuf answers to the values of types.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format, struct_pb2, timestamp_pb2

from graftwork import types
from graftwork.errors import InternalError
from graftwork.transport.calls import Page
from graftwork.v1 import adapters_pb2, generation_pb2, server_pb2, strategies_pb2, tuning_pb2

_FINISH: Mapping[int, types.FinishReason] = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}
_POOLINGS: Mapping[int, types.AnsweredPooling] = {
    generation_pb2.POOLING_MEAN: "mean",
    generation_pb2.POOLING_CLS: "cls",
    generation_pb2.POOLING_LAST: "last",
    generation_pb2.POOLING_MAX: "max",
    generation_pb2.POOLING_MEAN_SQRT_LEN: "mean_sqrt_len",
    generation_pb2.POOLING_WEIGHTED_MEAN: "weightedmean",
    generation_pb2.POOLING_SEVERAL: "several",
}
_PROBLEM_TYPES: Mapping[int, types.ProblemType] = {
    generation_pb2.PROBLEM_TYPE_SINGLE_LABEL: "single_label",
    generation_pb2.PROBLEM_TYPE_MULTI_LABEL: "multi_label",
    generation_pb2.PROBLEM_TYPE_REGRESSION: "regression",
}
_STATES: Mapping[int, types.JobState] = {
    tuning_pb2.TUNING_JOB_STATE_PENDING: "pending",
    tuning_pb2.TUNING_JOB_STATE_RUNNING: "running",
    tuning_pb2.TUNING_JOB_STATE_PAUSED: "paused",
    tuning_pb2.TUNING_JOB_STATE_SUCCEEDED: "succeeded",
    tuning_pb2.TUNING_JOB_STATE_FAILED: "failed",
    tuning_pb2.TUNING_JOB_STATE_CANCELLED: "cancelled",
}
_FORMS: Mapping[int, types.DatasetForm] = {
    tuning_pb2.DATASET_FORMAT_CHAT: "chat",
    tuning_pb2.DATASET_FORMAT_PROMPT_COMPLETION: "prompt_completion",
    tuning_pb2.DATASET_FORMAT_INSTRUCTION: "instruction",
    tuning_pb2.DATASET_FORMAT_TEXT: "text",
}


def token_logprob(entry: generation_pb2.TokenLogprob) -> types.TokenLogprob:
    """A token with its log probability and the alternatives."""
    return types.TokenLogprob(
        token_id=entry.token_id,
        text=entry.text,
        logprob=entry.logprob if entry.HasField("logprob") else None,
        top=tuple(types.TopLogprob(top.token_id, top.text, top.logprob) for top in entry.top),
    )


def chunk(message: generation_pb2.GenerateResponse | generation_pb2.ChatResponse) -> types.GenerationChunk:
    """One piece of a generation or of an answer; both messages have the same fields."""
    usage = _usage(message.usage)
    return types.GenerationChunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(token_logprob(entry) for entry in message.logprobs),
        finish_reason=_FINISH.get(message.finish_reason),
        usage=usage if message.HasField("usage") else None,
        model=message.model,
        version=message.version,
        index=message.index,
        score=message.score if message.HasField("score") else None,
        prompt_logprobs=tuple(token_logprob(entry) for entry in message.prompt_logprobs),
    )


class Collector:
    """Puts the pieces of one generation together, and knows whether it is whole."""

    def __init__(self, *, wants_logprobs: bool, wants_prompt_logprobs: bool = False) -> None:
        self._wants_logprobs = wants_logprobs
        self._wants_prompt_logprobs = wants_prompt_logprobs
        self._chunks: list[types.GenerationChunk] = []

    @property
    def started(self) -> bool:
        """True once a piece has arrived; from then on the call must not be sent again."""
        return bool(self._chunks)

    def add(self, piece: types.GenerationChunk) -> types.GenerationChunk:
        """Takes a piece and returns it with model and version, which the server sends on the first and last only."""
        if self._chunks and not piece.model:
            first = self._chunks[0]
            piece = dataclasses.replace(piece, model=first.model, version=first.version)
        self._chunks.append(piece)
        return piece

    def check_whole(self, request_id: str) -> None:
        """Raises InternalError if the stream ended well before its last piece: half an answer must not look whole."""
        if not self._chunks or self._chunks[-1].finish_reason is None or self._chunks[-1].usage is None:
            raise InternalError(
                "the stream ended before its finish reason; the text so far is incomplete",
                reason="STREAM_TRUNCATED",
                request_id=request_id,
            )

    def result(self, request_id: str) -> types.Generation:
        """The whole generation. Raises InternalError if it is not whole."""
        self.check_whole(request_id)
        last = self._chunks[-1]
        assert last.usage is not None  # check_whole
        completions = tuple(self._completion(index) for index in sorted({piece.index for piece in self._chunks}))
        first = completions[0]
        prompt_logprobs = tuple(entry for piece in self._chunks for entry in piece.prompt_logprobs)
        return types.Generation(
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            logprobs=first.logprobs,
            usage=last.usage,
            model=last.model,
            version=last.version,
            completions=completions,
            prompt_logprobs=prompt_logprobs if self._wants_prompt_logprobs else None,
        )

    def _completion(self, index: int) -> types.Completion:
        pieces = [piece for piece in self._chunks if piece.index == index]
        finish_reason = pieces[-1].finish_reason
        if finish_reason is None:
            raise InternalError(f"completion {index} has no end", reason="STREAM_TRUNCATED")
        logprobs = tuple(entry for piece in pieces for entry in piece.logprobs)
        return types.Completion(
            index=index,
            text="".join(piece.text for piece in pieces),
            token_ids=tuple(token for piece in pieces for token in piece.token_ids),
            finish_reason=finish_reason,
            logprobs=logprobs if self._wants_logprobs else None,
            score=pieces[-1].score,
        )


def score(message: generation_pb2.ScoreResponse) -> types.Score:
    """The log probabilities of a given text."""
    tokens = tuple(token_logprob(entry) for entry in message.tokens)
    return types.Score(tokens, message.total_logprob, message.model, message.version)


def classifications(message: generation_pb2.ClassifyResponse) -> types.ClassificationResult:
    """The labels of every input."""
    return types.ClassificationResult(
        results=tuple(
            types.Classification(
                labels=tuple(
                    types.LabelScore(
                        score.label, score.logit, score.probability if score.HasField("probability") else None
                    )
                    for score in result.labels
                ),
                predicted_label=result.predicted_label,
                input_tokens=result.input_tokens,
            )
            for result in message.results
        ),
        problem_type=_PROBLEM_TYPES.get(message.problem_type, "regression"),
        usage=_usage(message.usage),
        model=message.model,
        version=message.version,
    )


def embeddings(message: generation_pb2.EmbedResponse) -> types.EmbeddingResult:
    """The vector of every input."""
    return types.EmbeddingResult(
        embeddings=tuple(types.Embedding(tuple(one.values), one.input_tokens) for one in message.embeddings),
        pooling=_POOLINGS.get(message.pooling, "mean"),
        usage=_usage(message.usage),
        model=message.model,
        version=message.version,
    )


def _usage(message: generation_pb2.Usage) -> types.Usage:
    return types.Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def tokenization(message: generation_pb2.TokenizeResponse) -> types.Tokenization:
    """Token ids and their texts."""
    return types.Tokenization(tuple(message.token_ids), tuple(message.tokens), message.context_tokens)


def _adapter(message: adapters_pb2.Adapter, report: adapters_pb2.LoadReport | None = None) -> types.Adapter:
    load_report = None
    if report is not None:
        load_report = types.LoadReport(
            modules_bound=report.modules_bound,
            rank=report.rank,
            device_bytes=report.device_bytes,
            load_ms=report.load_ms,
            already_loaded=report.already_loaded,
        )
    return types.Adapter(
        name=message.name,
        adapter_id=message.adapter_id,
        version=message.version,
        digest=message.digest,
        strategy=message.strategy,
        base_fingerprint=message.base_fingerprint,
        size_bytes=message.size_bytes,
        parameter_count=message.parameter_count,
        loaded=message.loaded,
        create_time=_time(message, "create_time"),
        tuning_job=message.tuning_job,
        rank=message.rank,
        pinned=message.pinned,
        load_report=load_report,
        follows_version=message.follows_version,
    )


def loaded_adapter(
    message: adapters_pb2.CreateAdapterResponse | adapters_pb2.LoadAdapterResponse | adapters_pb2.PinAdapterResponse,
) -> types.Adapter:
    """An adapter with what its load bound, if it was loaded."""
    return _adapter(message.adapter, message.load_report if message.HasField("load_report") else None)


def adapter(message: adapters_pb2.GetAdapterResponse | adapters_pb2.UnpinAdapterResponse) -> types.Adapter:
    """An adapter."""
    return _adapter(message.adapter)


def unloaded_adapter(message: adapters_pb2.UnloadAdapterResponse) -> types.Adapter:
    """An adapter, and whether its pin ended with it."""
    return dataclasses.replace(_adapter(message.adapter), unpinned=message.unpinned)


def adapter_page(message: adapters_pb2.ListAdaptersResponse) -> Page[types.Adapter]:
    """One page of adapters."""
    return Page(tuple(_adapter(item) for item in message.adapters), message.next_page_token)


def version_page(message: adapters_pb2.ListVersionsResponse) -> Page[types.Adapter]:
    """One page of an adapter's versions."""
    return Page(tuple(_adapter(item) for item in message.versions), message.next_page_token)


def _strategy(message: strategies_pb2.Strategy) -> types.Strategy:
    try:
        schema: Any = json.loads(message.config_json_schema or "{}")
    except ValueError:
        # A plugin's schema comes from outside; an unreadable one must not hide the strategy.
        schema = {}
    return types.Strategy(
        name=message.name,
        strategy_id=message.strategy_id,
        version=message.version,
        api_version=message.api_version,
        distribution=message.distribution,
        description=message.description,
        capabilities=tuple(message.capabilities),
        config_schema=schema if isinstance(schema, dict) else {},
        load_error=message.load_error,
    )


def strategy(message: strategies_pb2.GetStrategyResponse) -> types.Strategy:
    """A strategy."""
    return _strategy(message.strategy)


def strategy_page(message: strategies_pb2.ListStrategiesResponse) -> Page[types.Strategy]:
    """One page of strategies."""
    return Page(tuple(_strategy(item) for item in message.strategies), message.next_page_token)


def server(message: server_pb2.GetServerResponse) -> types.ServerInfo:
    """A server."""
    found = message.server
    return types.ServerInfo(
        version=found.version,
        versions=dict(found.versions),
        start_time=_time(found, "start_time"),
        engine_ready=found.engine_ready,
        base_model=types.BaseModelInfo(**_scalars(found.base_model, types.BaseModelInfo)),
        limits=types.ServerLimits(**_scalars(found.limits, types.ServerLimits)),
        loaded_versions=tuple(found.loaded_versions),
        adapter_count=found.adapter_count,
        sequence_count=found.sequence_count,
        jobs=tuple(job(item) for item in found.jobs),
        job_count=found.job_count,
    )


def dataset(message: tuning_pb2.UploadDatasetResponse | tuning_pb2.GetDatasetResponse) -> types.Dataset:
    """A stored data set."""
    return _dataset(message.dataset)


def dataset_page(message: tuning_pb2.ListDatasetsResponse) -> Page[types.Dataset]:
    """One page of data sets."""
    return Page(tuple(_dataset(item) for item in message.datasets), message.next_page_token)


def _dataset(data: tuning_pb2.Dataset) -> types.Dataset:
    return types.Dataset(
        name=data.name,
        dataset_id=data.dataset_id,
        display_name=data.display_name,
        format=_FORMS.get(data.format, "unspecified"),
        row_count=data.row_count,
        size_bytes=data.size_bytes,
        create_time=_time(data, "create_time"),
    )


def dataset_report(message: tuning_pb2.ValidateDatasetResponse) -> types.DatasetReport:
    """What a check of a data set found."""
    return types.DatasetReport(
        valid=message.valid,
        format=_FORMS.get(message.format, "unspecified"),
        row_count=message.row_count,
        errors=tuple(types.LineError(error.line, error.reason) for error in message.errors),
        error_count=message.error_count,
        total_tokens=message.total_tokens,
        loss_tokens=message.loss_tokens,
        longest_row_tokens=message.longest_row_tokens,
        cut_rows=message.cut_rows,
        more_errors=tuple(types.LineErrorKind(**_scalars(kind, types.LineErrorKind)) for kind in message.more_errors),
        warnings=tuple(message.warnings),
    )


def _progress(message: tuning_pb2.TuningProgress) -> types.TuningProgress:
    return types.TuningProgress(**_scalars(message, types.TuningProgress))


def _result(message: tuning_pb2.TuningResult) -> types.TuningResult:
    fields = _scalars(message, types.TuningResult)
    fields["validation_loss"] = message.validation_loss if message.HasField("validation_loss") else None
    return types.TuningResult(**fields)


def job(message: tuning_pb2.TuningJob) -> types.TuningJobInfo:
    """A tuning job."""
    return types.TuningJobInfo(
        name=message.name,
        job_id=message.job_id,
        spec=types.TuningSpec(
            strategy=message.spec.strategy,
            dataset=message.spec.dataset,
            validation_dataset=message.spec.validation_dataset,
            validation_fraction=message.spec.validation_fraction,
            adapter_id=message.spec.adapter_id,
            config=_struct(message.spec.config),
            load=message.spec.load,
            new_version=message.spec.new_version,
        ),
        state=_STATES.get(message.state, "unspecified"),
        progress=_progress(message.progress) if message.HasField("progress") else None,
        result=_result(message.result) if message.HasField("result") else None,
        error=message.error,
        estimate=(
            types.TuningEstimate(**_scalars(message.estimate, types.TuningEstimate))
            if message.HasField("estimate")
            else None
        ),
        create_time=_time(message, "create_time"),
        start_time=_time(message, "start_time"),
        end_time=_time(message, "end_time"),
        validation_loss=message.validation_loss if message.HasField("validation_loss") else None,
        follows_version=message.follows_version,
        choices=tuple(
            types.SettingChoice(
                choice.key, _whole(json_format.MessageToDict(choice.value)), choice.reason, choice.automatic
            )
            for choice in message.choices
        ),
        error_reason=message.error_reason,
    )


def job_page(message: tuning_pb2.ListTuningJobsResponse) -> Page[types.TuningJobInfo]:
    """One page of jobs."""
    return Page(tuple(job(item) for item in message.jobs), message.next_page_token)


def event(message: tuning_pb2.WatchTuningJobResponse) -> types.TuningEvent:
    """Something that happened to a job. One that only a newer client knows has the kind "unknown"."""
    item = message.event
    base: dict[str, Any] = {"sequence": item.sequence, "time": _time(item, "time")}
    match item.WhichOneof("event"):
        case "state":
            return types.TuningEvent(**base, kind="state", state=_STATES.get(item.state, "unspecified"))
        case "progress":
            return types.TuningEvent(**base, kind="progress", progress=_progress(item.progress))
        case "evaluation":
            evaluation = types.TuningEvaluation(item.evaluation.step, item.evaluation.loss)
            return types.TuningEvent(**base, kind="evaluation", evaluation=evaluation)
        case "checkpoint_step":
            return types.TuningEvent(**base, kind="checkpoint", checkpoint_step=item.checkpoint_step)
        case "message":
            return types.TuningEvent(**base, kind="message", message=item.message)
        case _:
            return types.TuningEvent(**base, kind="unknown")


def with_event(info: types.TuningJobInfo, item: types.TuningEvent) -> types.TuningJobInfo:
    """The job after an event: its state, progress and held-out loss follow what was streamed."""
    changes: dict[str, Any] = {}
    if item.state is not None:
        changes["state"] = item.state
    if item.progress is not None:
        changes["progress"] = item.progress
    if item.evaluation is not None:
        changes["validation_loss"] = item.evaluation.loss
    return dataclasses.replace(info, **changes)


def _scalars(message: Any, cls: type[Any]) -> dict[str, Any]:
    """The fields of a message that is the dataclass cls field by field; both sides use the proto's names."""
    return {field.name: getattr(message, field.name) for field in dataclasses.fields(cls)}


def _struct(message: struct_pb2.Struct) -> dict[str, Any]:
    return {key: _whole(value) for key, value in json_format.MessageToDict(message).items()}


def _whole(value: Any) -> Any:
    """Whole numbers as int: a Struct knows doubles only, and "rank": 8.0 is not what was asked for."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _time(message: Any, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    stamp: timestamp_pb2.Timestamp = getattr(message, field)
    return stamp.ToDatetime(tzinfo=UTC)
