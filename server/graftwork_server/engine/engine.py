"""The engine's step: schedule, run, sample, publish. Knows nothing of sockets, files or processes."""

from __future__ import annotations

from collections.abc import Callable

from llguidance import LLMatcher

from graftwork_server.config import ServerConfig
from graftwork_server.engine import sizes
from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.engine.adapters.pool import AdapterPool
from graftwork_server.engine.cache.block_pool import BlockPool
from graftwork_server.engine.decode_graphs import decode_steps_for
from graftwork_server.engine.encoder_runner import EncoderRunner
from graftwork_server.engine.runner import Runner
from graftwork_server.engine.sampling.sampler import Sampler
from graftwork_server.engine.scheduling import ends
from graftwork_server.engine.scheduling.admission import Admission
from graftwork_server.engine.scheduling.scheduler import Scheduler
from graftwork_server.engine.scheduling.sequence import Sequence
from graftwork_server.engine.scheduling.whole_scheduler import WholeScheduler
from graftwork_server.errors import ErrorBody
from graftwork_server.layers.attention.block_kv_cache import kv_cache_for
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.layers.models.base_model import BaseModel
from graftwork_server.layers.models.encoder_model import EncoderModel
from graftwork_server.types import AdapterRef
from graftwork_server.wire.engine import Generate, SequenceOutput


class Engine:
    """The base model, its adapters, and the sequences they answer."""

    def __init__(self, base: BaseModel, settings: ServerConfig, request_load: Callable[[AdapterRef], object]) -> None:
        """`request_load` starts loading an adapter off the step loop; called again, it does nothing new."""
        self.base = base
        num_blocks = sizes.kv_blocks(base, settings.max_sequences, settings.kv_memory_bytes)
        self.kv_tokens = num_blocks * BLOCK_TOKENS
        self.longest = min(base.info.context_tokens, self.kv_tokens or base.info.context_tokens)
        """Tokens that a sequence may come to."""
        self.blocks = BlockPool(num_blocks)
        self.adapters = AdapterPool(
            settings.adapter_memory_bytes or sizes.adapter_pool_bytes(base.device),
            base.engine_model.groups,
            base.dtype,
            base.device,
            settings.host_cache_bytes or sizes.host_cache_bytes(base.device),
            base.engine_model.kernels,
        )
        self._admission = Admission(self.adapters, _loading(request_load), settings.max_step_tokens)
        self._runner = self._made_runner(num_blocks, settings)
        self._scheduler = (Scheduler if base.info.generates else WholeScheduler)(
            self._admission,
            self.blocks,
            max_sequences=settings.max_sequences,
            max_step_tokens=settings.max_step_tokens,
            clear_blocks=self._runner.discard,
            eos_token_ids=base.info.eos_token_ids,
            prefix_cache=settings.prefix_cache,
            rope_borders=base.engine_model.rope_borders,
        )
        self._sampler = Sampler(base.head)

    def _made_runner(self, num_blocks: int, settings: ServerConfig) -> Runner | EncoderRunner:
        base, model = self.base, self.base.engine_model
        if isinstance(model, EncoderModel):
            return EncoderRunner(base)
        cache = kv_cache_for(base.layer_shapes, num_blocks, base.dtype, base.device, model.kernels, model.triton)
        graphs = decode_steps_for(
            model, cache, base.device, settings.max_sequences, self.longest, wanted=settings.cuda_graphs != "off"
        )
        return Runner(model, cache, base.device, graphs)

    @property
    def active(self) -> int:
        """Sequences that run or wait."""
        return len(self._scheduler.sequences)

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
        error = self._refusal(request)
        if error is not None:
            return SequenceOutput(request.id, [], "error", error=error)
        self._scheduler.add(Sequence.of(request, self._scheduler.eos_token_ids, matcher, self.longest))
        return None

    def _refusal(self, request: Generate) -> ErrorBody | None:
        if request.adapter is None and request.pool and request.pool.kind == "classify" and self.base.head is None:
            return ends.no_head(of_adapter=False)
        return ends.never_fits(request, self.kv_tokens) if self.base.info.generates else None

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence without an answer; unknown ids are ignored."""
        self._scheduler.cancel(sequence_id)

    def step(self) -> list[SequenceOutput]:
        """Runs one step; what it produced, empty if nothing could run."""
        step = self._scheduler.schedule()
        if not step.chunks:
            return step.refused
        results = self._runner.run(step.chunks)
        sampled = self._sampler.sample(results)
        return step.refused + self._scheduler.publish(sampled)

    def arrived(self, adapter: LoadedAdapter) -> None:
        """An adapter was loaded; its load's lease is the engine's from now on."""
        self._admission.arrived(adapter)

    def waited_for(self) -> set[str]:
        """Digests of the adapters of waiting sequences."""
        return self._admission.waited_for()

    def fail_waiting(self, digest: str, error: ErrorBody) -> list[SequenceOutput]:
        """Ends the waiting sequences of an adapter that could not be loaded."""
        return [self._scheduler.fail(sequence, error) for sequence in self._admission.waiting_for(digest)]


def _loading(request_load: Callable[[AdapterRef], object]) -> Callable[[Sequence], object]:
    return lambda sequence: request_load(sequence.request.adapter) if sequence.request.adapter else None
