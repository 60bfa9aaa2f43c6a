"""Checks a data set's file in a helper process: tokenising holds the interpreter's lock, and a file is a stranger's."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from graftwork_server.errors import InvalidArgument, Violation
from graftwork_server.helper import CheckDataset, HelperStopped, Value
from graftwork_server.helper_pool import HelperPool
from graftwork_server.isolated_text import stopped_error
from graftwork_server.logs import client
from graftwork_server.tuning.data import DatasetReport

SECONDS = 60.0
"""Longest time of a check, and a second more for every BYTES_PER_SECOND."""
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
                ends_with_caller=True,
            )
        except HelperStopped as stopped:
            what = "checking the data set"
            raise stopped_error(stopped, what, reason="DATASET_TOO_COSTLY", field="data", seconds=seconds) from None
        assert isinstance(answer, Value)
        return msgspec.convert(answer.value, DatasetReport)


def refuse_bad_lines(report: DatasetReport) -> None:
    """Raises InvalidArgument with one violation per bad line, up to 100, and the number of all."""
    if report.valid:
        return
    violations = [Violation(error.place or "data", error.reason) for error in report.errors]
    first = violations[0]
    lines = "1 line" if report.error_count == 1 else f"{report.error_count} lines"
    raise InvalidArgument(
        f"the data set cannot be used: {first.description}"
        if first.field == "data"
        else f"{lines} of the data set cannot be used; {first.field}: {first.description}",
        reason="DATASET_INVALID",
        violations=violations,
        metadata={"error_count": str(report.error_count)},
    )
