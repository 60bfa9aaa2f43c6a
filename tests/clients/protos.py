"""Messages that several tests answer with."""

from __future__ import annotations

from typing import Any

from google.protobuf import struct_pb2

from graftwork.v1 import adapters_pb2 as a
from graftwork.v1 import generation_pb2 as g
from graftwork.v1 import tuning_pb2 as t

LABELS = [g.LabelScore(label="good", logit=1.5, probability=0.75), g.LabelScore(label="bad", logit=0.25)]
CLASSIFIED = g.ClassifyResponse(
    results=[g.Classification(labels=LABELS, predicted_label="good", input_tokens=4)],
    problem_type=g.PROBLEM_TYPE_MULTI_LABEL,
    usage=g.Usage(prompt_tokens=4),
    model="mood",
    version=2,
)
EMBEDDED = g.EmbedResponse(
    embeddings=[g.Embedding(values=[0.5, -0.5, 0.25, 0.0, 1.0], input_tokens=3)],
    pooling=g.POOLING_CLS,
    usage=g.Usage(prompt_tokens=3),
    model="base",
)


def piece(text: str, *ids: int, model: str = "", version: int = 0, logprobs: list[float] | None = None) -> Any:
    entries = [g.TokenLogprob(token_id=i, text=text, logprob=p) for i, p in zip(ids, logprobs or [], strict=False)]
    return g.GenerateResponse(text=text, token_ids=ids, model=model, version=version, logprobs=entries)


def last(text: str = "", *ids: int, model: str = "m", version: int = 3, prompt: int = 2, completion: int = 3) -> Any:
    return g.GenerateResponse(
        text=text,
        token_ids=ids,
        model=model,
        version=version,
        finish_reason=g.FINISH_REASON_STOP,
        usage=g.Usage(prompt_tokens=prompt, completion_tokens=completion),
    )


def as_chat(message: Any) -> g.ChatResponse:
    return g.ChatResponse.FromString(message.SerializeToString())


def adapter(adapter_id: str = "dates", version: int = 1, **fields: Any) -> a.Adapter:
    return a.Adapter(
        name=f"adapters/{adapter_id}",
        adapter_id=adapter_id,
        version=version,
        digest="sha256:ab",
        strategy="lora",
        size_bytes=1_500_000,
        parameter_count=12345,
        rank=8,
        **fields,
    )


def job(state: Any = t.TUNING_JOB_STATE_RUNNING, job_id: str = "j1", **fields: Any) -> t.TuningJob:
    config = struct_pb2.Struct()
    config.update({"rank": 8, "learning_rate": 0.0002})
    spec = t.TuningJobSpec(strategy="lora", dataset="datasets/d1", adapter_id="dates", config=config)
    return t.TuningJob(name=f"tuningJobs/{job_id}", job_id=job_id, state=state, spec=spec, **fields)


def succeeded(job_id: str = "j1") -> t.TuningJob:
    result = t.TuningResult(
        adapter_version="adapters/dates/versions/2", trained_parameters=10, train_ms=65_000, final_loss=0.5
    )
    return job(t.TUNING_JOB_STATE_SUCCEEDED, job_id, result=result)


def event(sequence: int, **what: Any) -> t.WatchTuningJobResponse:
    return t.WatchTuningJobResponse(event=t.TuningEvent(sequence=sequence, **what))


def step_event(sequence: int, step: int, total: int = 3) -> t.WatchTuningJobResponse:
    progress = t.TuningProgress(
        step=step, total_steps=total, loss=1.5, learning_rate=2e-4, tokens_per_second=1234, eta_ms=5000
    )
    return event(sequence, progress=progress)
