"""graftwork strategy."""

from __future__ import annotations

import json
from typing import Any

from tests.clients.cli.running import objects
from tests.clients.scripted_server import ScriptedServer

from graftwork.v1 import strategies_pb2 as s


def test_strategy_commands(server: ScriptedServer, run: Any) -> None:
    rank = {"default": 8, "description": "Rank of the update."}
    schema = {"properties": {"rank": rank, "name": {"type": "string"}}, "required": ["name"]}
    lora = s.Strategy(strategy_id="lora", description="Low rank.", config_json_schema=json.dumps(schema))
    broken = s.Strategy(strategy_id="x", load_error="ImportError: no\nmodule")
    server.on("ListStrategies", s.ListStrategiesResponse(strategies=[lora, broken]))
    server.on("GetStrategy", s.GetStrategyResponse(strategy=lora))
    listed = run("strategy", "list").stdout
    assert "NOT LOADED: ImportError: no module\n" in listed
    assert [item["strategy_id"] for item in objects(run("strategy", "list", "--json"))[0]] == ["lora", "x"]
    lines = run("strategy", "show", "lora").stdout.splitlines()
    assert lines[-2:] == ["rank     8           Rank of the update.", "name     (required)  string"]
    assert objects(run("strategy", "show", "lora", "--json"))[0]["config_schema"] == schema
