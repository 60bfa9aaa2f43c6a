"""Checks a data set's file in a helper process: tokenising holds the interpreter's lock, and a file is a stranger's."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from graftwork_server.errors import InvalidArgument, Violation
from graftwork_server.logs import client
from graftwork_server.text.strangers.helper import CheckDataset, HelperStopped, Value
from graftwork_server.text.strangers.helper_pool import HelperPool
from graftwork_server.text.strangers.isolated_text import stopped_error
from graftwork_server.tuning.data import FIRST_ERRORS, DatasetReport

SECONDS = 60.0
"""Of a processor's time, for one check, and a second more for every BYTES_PER_SECOND."""
BYTES_PER_SECOND = 100_000
SLOW_BYTES = 1 << 20
"""Larger files leave a helper to smaller ones."""


class DatasetChecker:
    """Checks with the base model's tokenizer, in the pool's helpers."""

    def __init__(self, pool: HelperPool, context_tokens: int) -> None:
        self._pool = pool
        self.context_tokens = context_tokens

    async def check(self, path: Path, max_sequence_tokens: int = 0) -> DatasetReport:
        """The report on the file at `path`, rows cut to `max_sequence_tokens` (0: the context).

        Raises ResourceExhausted (QUEUE_FULL), InvalidArgument (DATASET_TOO_COSTLY), Unavailable (HELPER_DIED).
        """
        limit = max_sequence_tokens or self.context_tokens
        request = CheckDataset(str(path), limit, self.context_tokens)
        size = await asyncio.to_thread(os.path.getsize, path)
        slow, seconds = size > SLOW_BYTES, SECONDS + size / BYTES_PER_SECOND
        try:
            answer = await self._pool.run(
                f"client {client.get()}{' large' * slow}",
                lambda helper: helper.ask(request),
                seconds=seconds,
                at_once=self._pool.count,
                slow=slow,
                blame=False,
                ends_with_caller=True,
            )
        except HelperStopped as stopped:
            what = "checking the data set"
            raise stopped_error(stopped, what, reason="DATASET_TOO_COSTLY", field="data", seconds=seconds) from None
        assert isinstance(answer, Value)
        return msgspec.convert(answer.value, DatasetReport)


def refuse_bad_lines(report: DatasetReport, dataset: str = "the data set", field: str = "") -> None:
    """Raises InvalidArgument with the first ten bad lines as violations, then those after them by kind.

    `dataset` names it in the message, `field` is the request's, before each line.
    """
    if report.valid:
        return
    prefix = f"{field}: " if field else ""
    violations = [
        Violation(prefix + error.place if error.place else field or "data", error.reason)
        for error in report.errors[:FIRST_ERRORS]
    ]
    violations += [
        Violation(f"{prefix}{kind.count:,} more, the first in line {kind.first_line}", kind.reason)
        for kind in report.more_errors
    ]
    first = report.errors[0]
    place = f"{first.place}: " if first.place else ""
    problems = "" if report.error_count == 1 else f"{report.error_count} problems; the first: "
    no_loss = report.error_count == 1 and report.total_tokens > 0 and report.loss_tokens == 0
    raise InvalidArgument(
        f"{dataset} cannot be trained on: {problems}{place}{first.reason}",
        reason="DATASET_NO_LOSS" if no_loss else "DATASET_INVALID",
        violations=violations,
        metadata={"error_count": str(report.error_count)},
    )
