"""The engine's step: schedule, run, sample, publish. Knows nothing of sockets, files or processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from llguidance import LLMatcher

from graftwork_server.engine.adapters.bind_head import no_head, only_head
from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.engine.adapters.pool import AdapterPool
from graftwork_server.engine.cache.block_pool import BlockPool
from graftwork_server.engine.decode_graphs import decode_steps_for
from graftwork_server.engine.encoder_runner import EncoderRunner
from graftwork_server.engine.models.base import BaseModel
from graftwork_server.engine.runner import ChunkLogits, Runner
from graftwork_server.engine.sampling.grammars import Masks, too_complex
from graftwork_server.engine.sampling.pooling import answers
from graftwork_server.engine.sampling.sampler import sample, token_logprobs
from graftwork_server.engine.scheduling.admission import Admission
from graftwork_server.engine.scheduling.scheduler import Scheduler
from graftwork_server.engine.scheduling.sequence import Sequence
from graftwork_server.engine.scheduling.whole_scheduler import WholeScheduler
from graftwork_server.errors import ErrorBody
from graftwork_server.layers.attention.block_kv_cache import kv_cache_for
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.layers.encoder import EncoderModel
from graftwork_server.types import AdapterRef
from graftwork_server.wire.engine import Generate, SequenceOutput, TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Sizes and switches of the engine. Bytes 0: chosen from the device's memory."""

    max_sequences: int = 64
    max_step_tokens: int = 1024
    kv_memory_bytes: int = 0
    adapter_memory_bytes: int = 0
    prefix_cache: bool = True
    host_cache_bytes: int = 0
    """Of evicted adapters in host memory."""
    cuda_graphs: bool = True
    """On CUDA, decode steps are replayed as graphs."""


class Engine:
    """The base model, its adapters, and the sequences they answer."""

    def __init__(self, base: BaseModel, limits: EngineLimits, request_load: Callable[[AdapterRef], None]) -> None:
        """`request_load` starts loading an adapter off the step loop; called again, it does nothing new."""
        self.base = base
        num_blocks = _num_blocks(base, limits) if base.info.generates else 0
        self.kv_tokens = num_blocks * BLOCK_TOKENS
        self.blocks = BlockPool(num_blocks)
        self.adapters = AdapterPool(
            limits.adapter_memory_bytes or _default_adapter_bytes(base.device),
            base.engine_model.groups,
            base.dtype,
            base.device,
            limits.host_cache_bytes or _default_host_cache_bytes(base.device),
            base.engine_model.kernels,
        )
        self._admission = Admission(self.adapters, _loading(request_load), limits.max_step_tokens)
        sizes = {"max_sequences": limits.max_sequences, "max_step_tokens": limits.max_step_tokens}
        if isinstance(base.engine_model, EncoderModel):
            self._runner: Runner | EncoderRunner = EncoderRunner(base)
            self._scheduler: Scheduler | WholeScheduler = WholeScheduler(self._admission, **sizes)
        else:
            model = base.engine_model
            cache = kv_cache_for(base.layer_shapes, num_blocks, base.dtype, base.device, model.kernels, model.triton)
            longest = min(base.info.context_tokens, self.kv_tokens)
            graphs = decode_steps_for(model, cache, base.device, limits.max_sequences, longest, limits.cuda_graphs)
            self._runner = Runner(model, cache, base.device, graphs)
            self._scheduler = Scheduler(
                self._admission,
                self.blocks,
                prefix_cache=limits.prefix_cache,
                rope_borders=model.rope_borders,
                **sizes,
            )
        self._sequences: dict[int, Sequence] = {}
        self._masks = Masks()
        self._eos = frozenset(base.info.eos_token_ids)

    @property
    def active(self) -> int:
        """Sequences that run or wait."""
        return len(self._sequences)

    @property
    def cache_figures(self) -> tuple[int, int]:
        """Prompt tokens so far, and how many of them were in the cache."""
        return self._admission.prompt_tokens, self._admission.cached_tokens

    @property
    def has_running(self) -> bool:
        """Sequences run, so another step will do something."""
        return bool(self._scheduler.running)

    def add(self, request: Generate, matcher: LLMatcher | None = None) -> SequenceOutput | None:
        """Queues a sequence, with the matcher of its structured output. Returns an output with an error if it can never
        run."""
        needed = len(request.prompt_ids) + request.sampling.max_tokens
        if request.adapter is None and request.pool and request.pool.kind == "classify" and self.base.head is None:
            return SequenceOutput(request.id, [], "error", error=no_head(of_adapter=False))
        if needed > self.kv_tokens and self.base.info.generates:
            message = f"prompt and max_tokens are {needed} tokens; the KV cache holds {self.kv_tokens}"
            error = ErrorBody(code="INVALID_ARGUMENT", reason="KV_CACHE_TOO_SMALL", message=message)
            return SequenceOutput(request.id, [], "error", error=error)
        longest = min(self.base.info.context_tokens, self.kv_tokens or self.base.info.context_tokens)
        sequence = Sequence.of(request, self._eos, matcher, longest)
        self._sequences[request.id] = sequence
        self._admission.add(sequence)
        return None

    def arrived(self, adapter: LoadedAdapter) -> None:
        """An adapter was loaded; its load's lease is the engine's from now on."""
        self._admission.arrived(adapter)

    def waited_for(self) -> set[str]:
        """Digests of the adapters of waiting sequences."""
        return self._admission.waited_for()

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence without an answer; unknown ids are ignored."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._scheduler.finish(sequence)

    def fail_waiting(self, digest: str, error: ErrorBody) -> list[SequenceOutput]:
        """Ends the waiting sequences of an adapter that could not be loaded."""
        failed = self._admission.waiting_for(digest)
        return [self._end(sequence, SequenceOutput(sequence.id, [], "error", error=error)) for sequence in failed]

    def step(self) -> list[SequenceOutput]:
        """Runs one step; what it produced, empty if nothing could run."""
        chunks = self._scheduler.schedule()
        wrong = [chunk.sequence for chunk in chunks if chunk.sequence.is_refused]
        if wrong:
            chunks = [chunk for chunk in chunks if not chunk.sequence.is_refused]
        refused = [
            self._end(sequence, _misdirected(sequence) if sequence.misdirected else _too_long(sequence))
            for sequence in wrong
        ]
        if not chunks:
            return refused
        results = self._runner.run(chunks)
        outputs = refused + [self._discard(result.chunk.sequence) for result in results if not result.finite]
        results = [result for result in results if result.finite]
        for result in results:
            result.chunk.sequence.computed += result.chunk.count
        outputs.extend(self._prompt_outputs(results) + self._pooled_outputs(results))
        sampling = [result for result in results if result.chunk.samples and not self._only_scored(result)]
        if sampling:
            outputs.extend(self._sample(sampling))
        return outputs

    def _discard(self, sequence: Sequence) -> SequenceOutput:
        """Ends a sequence with logits that are not finite; what it computed is found by nobody."""
        self._runner.discard(self.blocks.forget(sequence.block_table))
        return self._end(sequence, _not_finite(sequence))

    def _only_scored(self, result: ChunkLogits) -> bool:
        return result.chunk.sequence.request.sampling.max_tokens == 0

    def _prompt_outputs(self, results: list[ChunkLogits]) -> list[SequenceOutput]:
        """Collects log probabilities of prompts; ends the sequences that want nothing else."""
        outputs = []
        for result in results:
            sequence = result.chunk.sequence
            if sequence.wants_prompt_logprobs:
                _collect_prompt_logprobs(result)
            if result.chunk.samples and self._only_scored(result) and sequence.request.pool is None:
                scored = list(sequence.prompt_logprobs) if sequence.request.prompt_logprobs is not None else None
                outputs.append(self._end(sequence, SequenceOutput(sequence.id, [], "length", prompt_logprobs=scored)))
        return outputs

    def _pooled_outputs(self, results: list[ChunkLogits]) -> list[SequenceOutput]:
        """Ends the sequences whose hidden state is whole."""
        pooled = [
            result.chunk.sequence
            for result in results
            if result.chunk.samples and result.chunk.sequence.request.pool is not None
        ]
        outputs = []
        for sequence, output in zip(pooled, answers(pooled, self.base.head), strict=True):
            outputs.append(self._end(sequence, output) if output is not None else self._discard(sequence))
        return outputs

    def _sample(self, results: list[ChunkLogits]) -> list[SequenceOutput]:
        sequences = [result.chunk.sequence for result in results]
        logits = torch.stack([result.logits[-1] for result in results])  # [sequences, vocabulary]
        # sample changes what it is given.
        shown = any(sequence.request.sampling.logprobs is not None for sequence in sequences)
        tokens = sample(logits.clone() if shown else logits, sequences, self._masks)
        outputs = []
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            if token is None or not sequence.accepts(token):
                outputs.append(self._end(sequence, _nothing_allowed(sequence)))
                continue
            logprobs = self._logprobs(sequence, logits[row : row + 1], token)
            first = sequence.generated == 0
            prompt_logprobs = list(sequence.prompt_logprobs) if first and sequence.wants_prompt_logprobs else None
            sequence.tokens.append(token)
            finish = self._finish_reason(sequence, token)
            cached = (sequence.cached_tokens or 0) if first else 0
            output = SequenceOutput(sequence.id, [token], finish, logprobs, prompt_logprobs, cached_tokens=cached)
            outputs.append(self._end(sequence, output) if finish else output)
        return outputs

    def _logprobs(self, sequence: Sequence, logits: torch.Tensor, token: int) -> list[TokenLogprobs] | None:
        top = sequence.request.sampling.logprobs
        return None if top is None else token_logprobs(logits, [token], top)

    def _finish_reason(self, sequence: Sequence, token: int) -> str:
        sampling = sequence.request.sampling
        matcher = sequence.processing.matcher if sequence.processing else None
        if matcher is not None and matcher.is_stopped():
            return "stop"
        if (token in self._eos and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            return "stop"
        return "length" if sequence.generated >= sampling.max_tokens else ""

    def _end(self, sequence: Sequence, output: SequenceOutput) -> SequenceOutput:
        del self._sequences[sequence.id]
        self._scheduler.finish(sequence)
        return output


def _collect_prompt_logprobs(result: ChunkLogits) -> None:
    """Row i of a chunk predicts the token after it; the prompt's first token is predicted by nothing."""
    sequence, first = result.chunk.sequence, result.chunk.sequence.virtual_tokens
    start, end = max(result.chunk.start, first), result.chunk.start + result.chunk.count
    if start == first < end:
        sequence.prompt_logprobs.append(TokenLogprobs(sequence.tokens[first], None))
    targets = sequence.tokens[start + 1 : end + 1]
    if targets and start < end:
        top = sequence.request.prompt_logprobs or 0
        sequence.prompt_logprobs.extend(token_logprobs(result.logits[: len(targets)], targets, top))


def _loading(request_load: Callable[[AdapterRef], None]) -> Callable[[Sequence], None]:
    return lambda sequence: request_load(sequence.request.adapter) if sequence.request.adapter else None


def _misdirected(sequence: Sequence) -> SequenceOutput:
    error = no_head(of_adapter=True) if sequence.classifies else only_head()
    return SequenceOutput(sequence.id, [], "error", error=error)


def _too_long(sequence: Sequence) -> SequenceOutput:
    asked = len(sequence.request.prompt_ids) + sequence.request.sampling.max_tokens
    virtual = sequence.adapter.prefix.tokens if sequence.adapter and sequence.adapter.prefix else 0
    message = (
        f"prompt and max_tokens are {asked} tokens and the adapter puts {virtual} virtual tokens before them; "
        f"{sequence.longest} fit in all, so {sequence.longest - virtual} of the request's own"
    )
    error = ErrorBody(code="INVALID_ARGUMENT", reason="PROMPT_TOO_LONG", message=message)
    return SequenceOutput(sequence.id, [], "error", error=error)


def _not_finite(sequence: Sequence) -> SequenceOutput:
    who = "the base model" if sequence.digest is None else "the adapter"
    what = "logits" if sequence.request.pool is None else "values"
    message = f"{who} gave {what} that are NaN or infinite; its weights overflow in this dtype"
    error = ErrorBody(code="FAILED_PRECONDITION", reason="LOGITS_NOT_FINITE", message=message)
    return SequenceOutput(sequence.id, [], "error", error=error)


def _nothing_allowed(sequence: Sequence) -> SequenceOutput:
    grammar = sequence.request.sampling.grammar
    matcher = sequence.processing.matcher if sequence.processing else None
    if grammar is not None and matcher is not None and matcher.is_error():
        error = too_complex(grammar, matcher.get_error())
        return SequenceOutput(sequence.id, [], "error", error=error)
    message = (
        "bad_words, logit_bias, min_tokens and what the output must look like leave no token to go on with, after "
        f"{sequence.generated} tokens; allow more"
    )
    error = ErrorBody(code="FAILED_PRECONDITION", reason="NO_TOKEN_ALLOWED", message=message)
    return SequenceOutput(sequence.id, [], "error", error=error)


def _num_blocks(base: BaseModel, limits: EngineLimits) -> int:
    per_block = BLOCK_TOKENS * sum(shape.bytes_per_token(base.dtype) for shape in base.layer_shapes)
    wanted = limits.max_sequences * -(-base.info.context_tokens // BLOCK_TOKENS)
    available = limits.kv_memory_bytes or _default_kv_bytes(base.device)
    return max(1, min(wanted, available // per_block))


def _default_kv_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.6)
    return 2 * 1024**3


def _default_host_cache_bytes(device: torch.device) -> int:
    return 4 * 1024**3 if device.type == "cuda" else 0


def _default_adapter_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.2)
    return 2 * 1024**3
