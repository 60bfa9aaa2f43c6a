"""The nouns of the step loop: a sequence, and what a step does with it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from graftwork_server.engine.slots import LoadedAdapter
from graftwork_server.messages import Generate, TokenLogprobs


@dataclass(eq=False)
class Sequence:
    """One request in the engine."""

    request: Generate
    tokens: list[int]
    """Prompt and generated tokens."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    block_table: list[int] = field(default_factory=list)
    adapter: LoadedAdapter | None = None
    """Leased while the sequence runs."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    random: random.Random = field(default_factory=random.Random)
    """The request's own stream, one draw per sampled token."""

    @classmethod
    def of(cls, request: Generate) -> Sequence:
        """A new sequence for `request`."""
        return cls(request, list(request.prompt_ids), random=random.Random(request.sampling.seed))

    @property
    def id(self) -> int:
        """The request's id."""
        return self.request.id

    @property
    def digest(self) -> str | None:
        """Digest of the adapter that it asks for; None is the base."""
        return self.request.adapter.digest if self.request.adapter else None

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

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
