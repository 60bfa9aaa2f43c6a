from __future__ import annotations

from typing import Any

import pytest
from tests.clients.scripted_server import ScriptedServer
from typer.testing import CliRunner, Result

from graftwork.cli.app import app


@pytest.fixture
def run(server: ScriptedServer) -> Any:
    def invoke(*arguments: str, stdin: str = "", code: int = 0) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=stdin, env={"GRAFTWORK_ADDRESS": server.address})
        assert result.exit_code == code, result.output + result.stderr
        assert "Traceback" not in result.output + result.stderr
        return result

    return invoke
