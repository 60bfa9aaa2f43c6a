"""graftwork embed."""

from __future__ import annotations

import json
from typing import Any

from tests.clients.protos import EMBEDDED
from tests.clients.scripted_server import ScriptedServer


def test_embed_command(server: ScriptedServer, run: Any) -> None:
    server.on("Embed", EMBEDDED, EMBEDDED)
    shown = run("embed", "base", "x" * 70, "--pooling", "cls", "--no-normalize").stdout.splitlines()
    assert shown[1].split("  ")[0] == "x" * 57 + "..."
    assert shown[1].endswith("3       5           cls      [0.5000, -0.5000, 0.2500, 0.0000, ...]")
    assert server.requests("Embed")[0].normalize is False
    answer = json.loads(run("embed", "base", "x", "--dimensions", "5", "--json").stdout)
    assert answer["embeddings"] == [{"values": [0.5, -0.5, 0.25, 0.0, 1.0], "input_tokens": 3}]
    assert (answer["pooling"], server.requests("Embed")[1].dimensions) == ("cls", 5)
    assert "mean, cls, last, max," in run("embed", "base", "x", "--pooling", "sum", code=2).stderr
