"""A process that matches regular expressions of strangers: one JSON question a line, one answer a line.

It is run by its path and imports nothing but these, so it starts in about 20 ms. It ends with its input.
"""

import json
import re
import resource
import sys
from typing import Any

_PROCESSOR_SECONDS = 2
_MEMORY_BYTES = 256 << 20


def main() -> None:
    """Answers until its input ends, or the kernel ends it for the time it took."""
    resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_SECONDS, _PROCESSOR_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled: dict[str, re.Pattern[str]] = {}
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(_first_match(question["patterns"], question["name"], compiled)), flush=True)


def _first_match(patterns: list[str], name: str, compiled: dict[str, re.Pattern[str]]) -> dict[str, Any]:
    for index, pattern in enumerate(patterns):
        try:
            if pattern not in compiled:
                compiled[pattern] = re.compile(pattern)
            if compiled[pattern].fullmatch(name):
                return {"index": index}
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            return {"index": index, "error": str(error) or type(error).__name__}
    return {"index": None}


if __name__ == "__main__":
    main()
