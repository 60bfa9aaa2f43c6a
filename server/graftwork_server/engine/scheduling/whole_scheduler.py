"""What runs in the next step of an encoder: whole sequences, in the order of their turns, under a token budget.

An encoder's token sees those behind it too, so a sequence cannot be cut into chunks; and it ends in the step that it
runs in, so there are no blocks to hold and nobody to preempt.
"""

from __future__ import annotations

from graftwork_server.engine.scheduling.scheduler import Scheduler
from graftwork_server.engine.scheduling.sequence import ScheduledChunk


class WholeScheduler(Scheduler):
    """Schedules whole sequences. One of more than max_step_tokens runs alone."""

    def _chunks(self) -> list[ScheduledChunk]:
        """Nobody overtakes one that is too long for what is left of the step."""
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
