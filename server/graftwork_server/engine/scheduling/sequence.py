"""The nouns of the step loop: a sequence, and what a step does with it."""

from __future__ import annotations

import bisect
import random
import sys
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.engine.cache.block_pool import block_key, root_key
from graftwork_server.engine.sampling.logits_processing import LogitsProcessing, ProcessedRow
from graftwork_server.layers.attention.kv_cache import BLOCK_TOKENS
from graftwork_server.wire.engine import Generate, Pooled, TokenLogprobs

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher

_VIRTUAL_TOKEN = 0
"""The id that stands for a virtual token; any that is in every vocabulary."""


@dataclass(eq=False)
class Sequence:
    """One request in the engine."""

    request: Generate
    tokens: list[int]
    """Virtual tokens, prompt and generated tokens."""
    longest: int = sys.maxsize
    """Tokens that it may have in all."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    block_table: list[int] = field(default_factory=list)
    cached_blocks: int = 0
    """Blocks, from the first on, that others can find by their keys."""
    cached_tokens: int | None = None
    """Prompt tokens that were in the cache when it first ran, virtual ones not counted; None before that."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    random: random.Random = field(default_factory=random.Random)
    """The request's own stream, one draw per sampled token."""
    processing: LogitsProcessing | None = None
    """What its request changes in its logits, if anything."""

    virtual_tokens: int = 0
    """How many of `tokens` are the adapter's virtual ones; their ids mean nothing."""
    rope_regime: int = 0
    """Which rotary frequencies its keys in the cache were turned with: of how many borders it was beyond."""
    too_long: bool = False
    """With the adapter's virtual tokens it would be longer than `longest`."""
    state: torch.Tensor | None = None
    """[hidden] float32: the vector that is wanted of it. Before all its tokens were seen: [poolings, hidden], what
    there is so far (sampling/pooling.py)."""
    misdirected: bool = False
    """It asks its adapter for tokens, which has a head instead, or for labels without a head."""
    _adapter: LoadedAdapter | None = None
    _block_keys: list[bytes] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        request: Generate,
        eos_token_ids: frozenset[int] = frozenset(),
        matcher: LLMatcher | None = None,
        longest: int = sys.maxsize,
    ) -> Sequence:
        """A new sequence for `request`; the model's end-of-sequence tokens matter for min_tokens.
        matcher: of its structured output. longest: tokens that it may come to, virtual ones included."""
        sampling = request.sampling
        return cls(
            request,
            list(request.prompt_ids),
            longest,
            random=random.Random(sampling.seed),
            processing=LogitsProcessing.of(sampling, eos_token_ids, matcher),
        )

    @property
    def adapter(self) -> LoadedAdapter | None:
        """Leased while the sequence runs."""
        return self._adapter

    @adapter.setter
    def adapter(self, adapter: LoadedAdapter | None) -> None:
        """The first lease of an adapter with virtual tokens puts them before the prompt: from then on they are counted,
        given cache blocks and positions, and cached as all tokens are."""
        self._adapter = adapter
        if adapter is not None:
            self.misdirected = self.classifies if adapter.head is None else self.request.pool is None
        if adapter is None or adapter.prefix is None or self.virtual_tokens:
            return
        count = adapter.prefix.tokens
        if count + len(self.request.prompt_ids) + self.request.sampling.max_tokens > self.longest:
            self.too_long = True
            return
        self.virtual_tokens = count
        virtual = [_VIRTUAL_TOKEN] * count
        self.tokens[:0] = virtual
        self.request = msgspec.structs.replace(self.request, prompt_ids=[*virtual, *self.request.prompt_ids])

    @property
    def id(self) -> int:
        """The request's id."""
        return self.request.id

    @property
    def digest(self) -> str | None:
        """Digest of the adapter that it asks for; None is the base."""
        return self.request.adapter.digest if self.request.adapter else None

    @property
    def priority(self) -> int:
        """The request's priority; higher ones run first."""
        return self.request.priority

    def block_key(self, index: int) -> bytes:
        """Key of its block `index`, which must be full. Only while an adapter is leased, or after: before the first
        lease its virtual tokens may be missing."""
        while len(self._block_keys) <= index:
            root = root_key(self.digest, self.request.cache_salt, self.rope_regime)
            parent = self._block_keys[-1] if self._block_keys else root
            start = len(self._block_keys) * BLOCK_TOKENS
            self._block_keys.append(block_key(parent, self.tokens[start : start + BLOCK_TOKENS]))
        return self._block_keys[index]

    def passes_border(self, rope_borders: SequenceOf[int]) -> bool:
        """Whether its length, unlike when it was last asked, has passed one of the borders (EngineModel.rope_borders):
        keys of before do not go with those to come. From then on it has the frequencies of its present length."""
        regime = bisect.bisect_left(rope_borders, len(self.tokens))
        if regime == self.rope_regime:
            return False
        self.rope_regime = regime
        self._block_keys.clear()
        return True

    @property
    def is_refused(self) -> bool:
        """It must not be run."""
        return self.too_long or self.misdirected

    @property
    def classifies(self) -> bool:
        """It wants the labels of a head."""
        return self.request.pool is not None and self.request.pool.kind == "classify"

    def processed_row(self, row: int) -> ProcessedRow | None:
        """What is changed in its logits, which are in `row`; None if nothing is."""
        if self.processing is None:
            return None
        prompt_tokens = len(self.request.prompt_ids)
        return ProcessedRow(row, self.processing, self.tokens, prompt_tokens, self.virtual_tokens)

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def accepts(self, token: int) -> bool:
        """Tells the matcher of a structured output, if there is one, which token was chosen; false if it failed."""
        matcher = self.processing.matcher if self.processing else None
        # In an error a matcher counts as stopped too, so its word is asked for first.
        return matcher is None or matcher.consume_token(token)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Every position of the prompt needs logits."""
        return self.request.prompt_logprobs is not None and self.generated == 0


@dataclass(frozen=True)
class ScheduledChunk:
    """`count` tokens of a sequence, from `start` on, to be run in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """It reaches the sequence's end, so the next token is sampled from it."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def pools(self) -> bool:
        """It reaches the end of a sequence that wants a vector."""
        return self.samples and self.sequence.request.pool is not None

    @property
    def samples_token(self) -> bool:
        """The sequence's next token is sampled from it."""
        return self.samples and self.sequence.request.sampling.max_tokens > 0


@dataclass(frozen=True)
class ChunkLogits:
    """Logits [rows, vocabulary] float32 of a chunk: of all its tokens if the prompt's log probabilities are wanted,
    else of its last token; none of a chunk of virtual tokens alone."""

    chunk: ScheduledChunk
    logits: torch.Tensor
    finite: torch.Tensor
    """[] bool: none of them is NaN or infinite."""


@dataclass
class Sampled:
    """What a step made of a chunk."""

    chunk: ScheduledChunk
    finite: bool = True
    """None of its logits, or of its vector's values, is NaN or infinite."""
    token: int | None = None
    """The next token; None if none was sampled, or none is allowed."""
    logprobs: list[TokenLogprobs] | None = None
    """Of the token, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the chunk's part of the prompt, if they were asked for."""
    pooled: Pooled | None = None
