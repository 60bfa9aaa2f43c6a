"""What transformers and PEFT say by themselves, with no line of Graftwork's code in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4
PROMPT = [1, 20, 45, 77, 130, 99]
"""Token ids for the shared model."""


class Reference:
    """A model directory, alone or under a PEFT adapter directory, in float32."""

    def __init__(self, model_dir: Path, adapter_dir: Path | None = None) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._model = (PeftModel.from_pretrained(model, adapter_dir) if adapter_dir else model).eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary] of one forward over all of `ids`."""
        # Of prompt tuning there are rows for virtual tokens before them.
        return self._model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -len(ids) :]

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Log probability of every token but the first."""
        table = torch.log_softmax(self.logits(ids)[:-1], dim=-1)
        return [float(table[position, token]) for position, token in enumerate(ids[1:])]

    def assert_greedy(self, prompt: Sequence[int], answer: Sequence[int], who: str = "") -> None:
        """Each token of the answer must be the most likely one after what precedes it."""
        rows = self.logits([*prompt, *answer])[len(prompt) - 1 : -1]
        for position, (row, token) in enumerate(zip(rows, answer, strict=True)):
            assert row[token] >= row.max() - TOLERANCE, f"{who}: token {position} is {token}, not {int(row.argmax())}"

    def assert_scored(self, ids: Sequence[int], logprobs: Sequence[float | None]) -> None:
        """The server's logprobs of `ids` must be ours."""
        assert logprobs[0] is None
        ours = self.logprobs(ids)
        assert len(logprobs) == len(ours) + 1
        worst = max(abs(a - b) for a, b in zip(ours, logprobs[1:], strict=True))
        assert worst < TOLERANCE, f"logprobs differ by {worst}"
