"""What runs in the next step of an encoder: whole sequences, in the order of their turns, under a token budget.

An encoder's token sees those behind it too, so a sequence cannot be cut into chunks; and it ends in the step that it
runs in, so there are no blocks to hold and nobody to preempt.
"""

from __future__ import annotations

from graftwork_server.engine.scheduling.admission import Admission
from graftwork_server.engine.scheduling.sequence import ScheduledChunk, Sequence


class WholeScheduler:
    """Scheduler's counterpart, with the same methods."""

    def __init__(self, admission: Admission, *, max_sequences: int, max_step_tokens: int) -> None:
        """A sequence of more than max_step_tokens runs alone."""
        self.running: list[Sequence] = []
        self._admission = admission
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens

    def schedule(self) -> list[ScheduledChunk]:
        """The sequences of the next step; empty if nothing can run now. Nobody overtakes one that is too long for what
        is left of the step."""
        chunks: list[ScheduledChunk] = []
        budget = self._max_step_tokens
        candidates = self._admission.candidates()
        while len(chunks) < self._max_sequences and budget > 0:
            sequence = next(candidates, None)
            if sequence is None:
                break
            count = len(sequence.tokens)
            if chunks and count > budget:
                self._admission.release(sequence)
                break
            self._admission.begin(sequence)
            self.running.append(sequence)
            chunks.append(ScheduledChunk(sequence, 0, count))
            budget -= count
        self._admission.ask_for_adapters()
        return chunks

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its lease back."""
        if not self._admission.remove(sequence):
            self.running.remove(sequence)
        self._admission.ended(sequence)
