"""Checks a data set's file away from the event loop: a small one in a thread, a large one in a process of its own,
because tokenising millions of rows in this process would take the interpreter from the token streams.

`python -m graftwork_server.tuning.dataset_check FILE MAX_SEQUENCE_TOKENS CONTEXT_TOKENS [TOKENIZER_DIR]` prints the
report as JSON.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from graftwork_server.errors import Internal, InvalidArgument, Violation
from graftwork_server.text import TextProcessor
from graftwork_server.tuning.data import FIRST_ERRORS, DatasetReport, check_dataset, read_lines

IN_PROCESS_BYTES = 256 << 10
MODULE = "graftwork_server.tuning.dataset_check"


class DatasetChecker:
    """Checks with the base model's tokenizer; `tokenizer_dir` is where `text` was read from, both None without one."""

    def __init__(self, text: TextProcessor | None, tokenizer_dir: str | None, context_tokens: int) -> None:
        self._text = text
        self._tokenizer_dir = tokenizer_dir if text is not None else None
        self.context_tokens = context_tokens

    async def check(self, path: Path, max_sequence_tokens: int = 0) -> DatasetReport:
        """The report on the file at `path`, rows cut to `max_sequence_tokens` (0: the context)."""
        limit = max_sequence_tokens or self.context_tokens
        if await asyncio.to_thread(os.path.getsize, path) <= IN_PROCESS_BYTES:
            return await asyncio.to_thread(_check_file, path, self._text, limit, self.context_tokens)
        arguments = [sys.executable, "-m", MODULE, str(path), str(limit), str(self.context_tokens)]
        process = await asyncio.create_subprocess_exec(
            *arguments,
            *([self._tokenizer_dir] if self._tokenizer_dir else []),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode != 0:
            raise Internal(f"the check of a data set ended with {process.returncode}", reason="DATASET_CHECK_DIED")
        return msgspec.json.decode(output, type=DatasetReport)


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


def _check_file(path: Path, text: TextProcessor | None, max_sequence_tokens: int, context_tokens: int) -> DatasetReport:
    with path.open("rb") as file:
        return check_dataset(read_lines(file), text, max_sequence_tokens, context_tokens)


def _main(path: str, max_sequence_tokens: str, context_tokens: str, tokenizer_dir: str | None = None) -> None:
    os.nice(10)
    text = TextProcessor.from_dir(tokenizer_dir) if tokenizer_dir else None
    report = _check_file(Path(path), text, int(max_sequence_tokens), int(context_tokens))
    sys.stdout.buffer.write(msgspec.json.encode(report))


if __name__ == "__main__":
    _main(*sys.argv[1:])
