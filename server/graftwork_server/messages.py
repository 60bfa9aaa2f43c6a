"""The messages between front, engine worker and tuner worker, and their framing.

Every message is one msgspec struct with a type tag, sent as a frame: 4 bytes of length (big endian), then MessagePack.
The front talks to the engine over a unix socket, the engine to a tuner over a socket pair; neither ever sees the
other's objects, so an engine on another machine needs nothing more than a transport.

    front -> engine    FrontMessage
    engine -> front    EngineMessage      the first one is Hello
    engine -> tuner    TunerCommand       the first one is StartTuning
    tuner -> engine    TunerEvent         forwarded to the front inside JobEvent
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import msgspec

from graftwork_server.errors import MESSAGE_CHARACTERS, ErrorBody, InvalidArgument
from graftwork_server.printable import make_printable
from graftwork_server.types import (
    AdapterRef,
    ArtifactInfo,
    LoadReport,
    ModelInfo,
    SettingChoice,
    StrategyInfo,
    TuningEstimate,
    TuningProgress,
    TuningResult,
)

MAX_FRAME_BYTES = 256 * 1024 * 1024

# ---------------------------------------------------------------------------------------------- front -> engine


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
    hidden state. pooling: for embed, one of engine/pooling.py or several joined by "+". dimensions: so many first
    values of it, 0: all."""

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


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A tuning job as engine and tuner see it. Paths are on this machine and the front's own."""

    job_id: str
    strategy: str
    config: dict[str, Any]
    dataset_path: str
    validation_path: str | None = None
    validation_fraction: float = 0.0
    job_dir: str
    """Checkpoints; outlives the tuner."""
    artifact_dir: str
    """Made by the tuner: the finished files. Exists whole or not at all (written beside it, then renamed)."""
    reported_step: int | None = None
    """The newest step that the front has a report of; None: it has all."""


class PrepareJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Validate a job's configuration and estimate it. Answered by Reply(result=PreparedJob)."""

    call_id: int
    strategy: str
    config: dict[str, Any]
    row_count: int
    total_tokens: int
    """Training tokens of one epoch."""
    held_out_rows: int = 0


class StartJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start a tuner. Answered by Reply(result=Started); then JobEvents follow until Finished or Failed.
    A job whose job_dir has a checkpoint resumes from it."""

    call_id: int
    job: JobSpec


class StopJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End a tuner, if it runs. Answered by Reply(result=Stopped) once its process is gone; no JobEvent follows."""

    call_id: int
    job_id: str


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Finish running sequences (at most `drain_ms`), then exit."""

    drain_ms: int = 0


FrontMessage = Generate | Cancel | Load | Unload | Pin | Inspect | PrepareJob | StartJob | StopJob | Shutdown

# ---------------------------------------------------------------------------------------------- engine -> front


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


class PreparedJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`config` has every setting filled in and is plain JSON; `choices` says where the ones that matter come from."""

    config: dict[str, Any]
    estimate: TuningEstimate
    choices: list[SettingChoice] = []


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The tuner's process id."""

    pid: int


class Stopped(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """was_running tells whether there was something to stop."""

    was_running: bool


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


# ---------------------------------------------------------------------------------------------- tuner -> engine


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step was done."""

    progress: TuningProgress


class Evaluated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Held-out loss per token after `step`."""

    step: int
    loss: float


class Checkpointed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A checkpoint of `step` is durable."""

    step: int


class Note(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Something worth reading: a resume, a warning."""

    text: str

    def __post_init__(self) -> None:
        make_printable(self, text=MESSAGE_CHARACTERS)


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """artifact_dir is complete."""

    result: TuningResult


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The job cannot go on."""

    error: ErrorBody


TunerEvent = Progress | Evaluated | Checkpointed | Note | Finished | Failed


class JobEvent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a tuner said."""

    job_id: str
    event: TunerEvent


EngineMessage = Hello | StartFailed | StepOutputs | Reply | LoadedChanged | JobEvent

# ---------------------------------------------------------------------------------------------- engine -> tuner


class TensorLayout(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies in the shared weights: torch dtype name without "torch.", shape, byte offset."""

    name: str
    dtype: str
    shape: list[int]
    offset: int


class SharedWeightsInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How to map the base weights in another process. On CPU `fd` is inherited; on CUDA `ipc` opens the allocation."""

    device: str
    size_bytes: int
    layout: list[TensorLayout]
    fd: int | None = None
    ipc: list[Any] | None = None
    config_json: str = ""
    """The transformers configuration, as JSON."""
    quantization: str = "none"
    """Of the linear layers, whose tensors in the layout are then those of engine/quantization.py."""


class StartTuning(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First message to a tuner."""

    job: JobSpec
    model: ModelInfo
    weights: SharedWeightsInfo
    gate_fd: int
    """Inherited file of 8 bytes: sequences the engine runs now (int64). The tuner yields while it is not 0."""
    threads: int
    yield_ms: int
    """Longest wait between two micro-batches while the engine is busy."""


TunerCommand = StartTuning

# ---------------------------------------------------------------------------------------------- framing

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
front_decoder: msgspec.msgpack.Decoder[FrontMessage] = msgspec.msgpack.Decoder(FrontMessage)
engine_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
tuner_decoder: msgspec.msgpack.Decoder[TunerEvent] = msgspec.msgpack.Decoder(TunerEvent)
command_decoder: msgspec.msgpack.Decoder[TunerCommand] = msgspec.msgpack.Decoder(TunerCommand)


def encode_frame(message: Any) -> bytes:
    """`message` as one frame.

    Raises InvalidArgument (MESSAGE_NOT_SENDABLE) for what no frame can hold: text that is no Unicode, numbers of more
    than 64 bits, values nested too deep, too many bytes. Only who waits for `message` may suffer from that.
    """
    try:
        body = _encoder.encode(message)
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise _not_sendable(message, str(error)) from error
    if len(body) > MAX_FRAME_BYTES:
        raise _not_sendable(message, f"it has {len(body)} bytes; {MAX_FRAME_BYTES} are accepted")
    return _LENGTH.pack(len(body)) + body


def _not_sendable(message: Any, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"what was asked for cannot be sent between the server's processes ({type(message).__name__}): {why}",
        reason="MESSAGE_NOT_SENDABLE",
    )


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


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame's body. Raises asyncio.IncompleteReadError at the end of the stream."""
    return await reader.readexactly(_body_length(await reader.readexactly(_LENGTH.size)))


def receive_frame(sock: socket.socket) -> bytes:
    """The next frame's body, blocking. Raises EOFError at the end of the stream."""
    return bytes(_receive_exactly(sock, _body_length(_receive_exactly(sock, _LENGTH.size))))


def _body_length(header: bytes | bytearray) -> int:
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return int(length)


def _receive_exactly(sock: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view.nbytes:
        received = sock.recv_into(view)
        if received == 0:
            raise EOFError("the other side closed the connection")
        view = view[received:]
    return buffer
