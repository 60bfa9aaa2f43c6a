"""graftwork classify."""

from __future__ import annotations

import json
from typing import Any

from tests.clients.protos import CLASSIFIED
from tests.clients.scripted_server import ScriptedServer

from graftwork.v1 import generation_pb2 as g


def test_classify_command(server: ScriptedServer, run: Any) -> None:
    server.on("Classify", CLASSIFIED, CLASSIFIED, CLASSIFIED)
    assert run("classify", "mood", "fine").stdout.splitlines() == [
        "text  label  probabilities",
        "fine  good   good 0.7500, bad 0.2500",
    ]
    answer = json.loads(run("classify", "mood", "fine", "--json").stdout)
    assert answer["results"][0]["labels"][0] == {"label": "good", "logit": 1.5, "probability": 0.75}
    run("classify", "mood", "fine", "--pair", "so so")
    assert server.requests("Classify")[2].inputs[0] == g.TextInput(text="fine", text_pair="so so")
