"""The messages between front and engine."""

from __future__ import annotations

import msgspec

from graftwork_server.errors import (
    ErrorBody,
)
from graftwork_server.types import (
    AdapterRef,
    ArtifactInfo,
    LoadReport,
    ModelInfo,
    StrategyInfo,
)
from graftwork_server.wire.tuning import (
    Failed,
    Finished,
    JobEvent,
    PreparedJob,
    PrepareJob,
    Started,
    StartJob,
    StopJob,
    Stopped,
)


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an output must look like. kind: "json_schema", "regex", "choice" (text: a JSON list) or "lark"."""

    kind: str
    text: str


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence is sampled; validated by the front. temperature 0 is greedy; what stands here cuts nothing."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. k: the chosen token's and those of the k most likely tokens."""
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    bad_words: list[list[int]] = []
    """Token sequences that must not be completed."""
    stop_token_ids: list[int] = []
    """End the sequence beside the model's own end-of-sequence tokens."""
    min_tokens: int = 0
    """So many tokens are sampled before one that ends the sequence."""
    grammar: Grammar | None = None


class Pool(msgspec.Struct, frozen=True, array_like=True):
    """What is wanted of a sequence in the place of tokens. kind: "classify", the logits of the head; "embed", one
    hidden state. pooling: for embed, one of POOLINGS of base/sentence_files.py or several joined by "+". dimensions: so
    many first values of it, 0: all."""

    kind: str
    pooling: str = ""
    normalize: bool = False
    dimensions: int = 0
    names_head: bool = False
    """The answer says what the head's outputs are called."""
    token_type_ids: list[int] = []
    """One for each token, for encoders that know types; empty: all 0."""


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Queue a sequence. Answered by SequenceOutputs with the same id until one of them has a finish reason."""

    id: int
    prompt_ids: list[int]
    sampling: Sampling
    adapter: AdapterRef | None = None
    prompt_logprobs: int | None = None
    """For Score: log probabilities of the prompt's tokens, in the first output. With sampling.max_tokens 0 nothing
    is sampled."""
    cache_salt: str = ""
    """Sequences share what the KV cache has only with those of the same salt."""
    priority: int = 0
    """Higher ones run first."""
    pool: Pool | None = None
    """For Classify and Embed: nothing is sampled (max_tokens must be 0), and the one output has `pooled`."""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End sequence `id` within a step; it sends nothing more. Unknown ids are ignored: it may just have ended."""

    id: int


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Load an adapter; answered by Reply(result=LoadReport)."""

    call_id: int
    adapter: AdapterRef


class Unload(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Unload once no sequence uses it; Reply(result=Unloaded) comes then. Unknown digests answer at once;
    pinned ones are refused (ADAPTER_PINNED)."""

    call_id: int
    digest: str


class Pin(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Never evict these, and no others, from now on, whether they are loaded yet or not. Reply(result=Pinned)."""

    call_id: int
    digests: list[str]


class Inspect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Read an artifact and check it against the base without loading it. strategy None: recognise it.
    Answered by Reply(result=ArtifactInfo)."""

    call_id: int
    path: str
    strategy: str | None = None
    content: str = ""
    """The front's name for what the files hold, wherever they are; the engine does not read it."""


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Finish running sequences (at most `drain_ms`), then exit."""

    drain_ms: int = 0


FrontMessage = Generate | Cancel | Load | Unload | Pin | Inspect | PrepareJob | StartJob | StopJob | Shutdown


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one token and of the most likely ones at its position, best first.
    `logprob` is None for a prompt's first token."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]] = []


class HeadInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a head's outputs are called, and transformers' problem_type."""

    labels: list[str]
    problem_type: str


class Pooled(msgspec.Struct, frozen=True, array_like=True):
    """Answer to Pool: float32 values, little endian; for "classify" with the head that gave them, if it was asked to be
    named."""

    values: bytes
    head: HeadInfo | None = None


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sequence. finish is "", "stop", "length" or "error"; the last three end it."""

    id: int
    token_ids: list[int]
    finish: str = ""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: ErrorBody | None = None
    cached_tokens: int = 0
    """In the first output: prompt tokens that the KV cache had and that were not computed."""
    pooled: Pooled | None = None


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """Everything one step produced, in one frame."""

    outputs: list[SequenceOutput]


class Unloaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """was_loaded tells whether there was something to unload."""

    was_loaded: bool


class Pinned(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to Pin."""


class LoadReply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to Load."""

    report: LoadReport


class InspectReply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to Inspect."""

    info: ArtifactInfo


Result = LoadReply | InspectReply | Unloaded | Pinned | PreparedJob | Started | Stopped


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to a message with a call_id: exactly one of result and error is set."""

    call_id: int
    result: Result | None = None
    error: ErrorBody | None = None


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine is ready: the base model is loaded."""

    pid: int
    model: ModelInfo
    strategies: list[StrategyInfo]


class StartFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot serve (model missing, unsupported architecture, ...) and exits."""

    error: ErrorBody


class LoadedChanged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Digests on the device now; sent after each change, and before the answer to the Load or Unload that made it."""

    digests: list[str]


EngineMessage = Hello | StartFailed | StepOutputs | Reply | LoadedChanged | JobEvent
front_decoder: msgspec.msgpack.Decoder[FrontMessage] = msgspec.msgpack.Decoder(FrontMessage)
engine_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)


def instead_of(message: EngineMessage, error: ErrorBody) -> list[EngineMessage]:
    """What says to those who wait for `message`, which cannot be sent, that it will not come."""
    match message:
        case Reply():
            return [Reply(call_id=message.call_id, error=error)]
        case StepOutputs(outputs=[output]):
            return [StepOutputs([SequenceOutput(output.id, [], "error", error=error)])]
        case StepOutputs():  # most of them can be sent
            return [StepOutputs([output]) for output in message.outputs]
        case JobEvent(event=Finished() | Failed()):
            return [JobEvent(job_id=message.job_id, event=Failed(error=error))]
    return []


def merge(outputs: list[SequenceOutput]) -> SequenceOutput:
    """Consecutive outputs of one sequence as one."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    return SequenceOutput(
        id=last.id,
        token_ids=[token for output in outputs for token in output.token_ids],
        finish=last.finish,
        logprobs=logprobs if any(output.logprobs is not None for output in outputs) else None,
        prompt_logprobs=outputs[0].prompt_logprobs,
        error=last.error,
        cached_tokens=outputs[0].cached_tokens,
    )
