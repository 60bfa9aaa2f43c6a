"""The options before the command, and --help."""

from __future__ import annotations

from typing import Any


def test_help_tells_the_exit_codes_and_commands(run: Any) -> None:
    text = run("--help").stdout
    for word in ("serve", "generate", "chat", "score", "adapter", "strategy", "tune", "dataset", "130  interrupted"):
        assert word in text
    assert run("--version").stdout.startswith("graftwork 0.")
