"""Training data: JSONL in four forms, checked line by line, turned into tokens with a label each. No torch here.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}   CHAT
    {"prompt": ..., "completion": ...}                                                              PROMPT_COMPLETION
    {"instruction": ..., "input": ..., "output": ...}     input optional                            INSTRUCTION
    {"text": ...}                                                                                   TEXT

lines.py reads lines, rows.py tokenises them, report.py checks a whole file.
"""

from graftwork_server.tuning.data.lines import MAX_LINE_BYTES, Example, LineProblem, read_examples, read_lines
from graftwork_server.tuning.data.report import (
    FIRST_ERRORS,
    DatasetReport,
    ErrorKind,
    LineError,
    check_dataset,
    check_dataset_file,
    how_to_fit,
    no_end,
)
from graftwork_server.tuning.data.rows import instruction_prompt, tokenize_example, tokenize_rows

__all__ = [
    "FIRST_ERRORS",
    "MAX_LINE_BYTES",
    "DatasetReport",
    "ErrorKind",
    "Example",
    "LineError",
    "LineProblem",
    "check_dataset",
    "check_dataset_file",
    "how_to_fit",
    "instruction_prompt",
    "no_end",
    "read_examples",
    "read_lines",
    "tokenize_example",
    "tokenize_rows",
]
