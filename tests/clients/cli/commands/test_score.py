"""graftwork score."""

from __future__ import annotations

from typing import Any

from tests.clients.cli.running import objects
from tests.clients.scripted_server import ScriptedServer

from graftwork.v1 import generation_pb2 as g


def test_score(server: ScriptedServer, run: Any) -> None:
    entries = [g.TokenLogprob(token_id=1, text="a"), g.TokenLogprob(token_id=22, text="b", logprob=-2.0)]
    server.on("Score", g.ScoreResponse(tokens=entries, total_logprob=-2.0, model="dates", version=2))
    (result,) = objects(run("score", "dates", "ab", "--json"))
    assert [token["logprob"] for token in result["tokens"]] == [None, -2.0]
    assert result["total_logprob"] == -2.0
    assert run("score", "dates", "ab").stdout.splitlines()[1:] == [
        "1      'a'   -",
        "22     'b'   -2.000000",
        "total -2.000000 (2 tokens, dates@2)",
    ]
