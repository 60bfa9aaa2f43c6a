"""The committed stubs are those of the committed .proto files, and the .proto files follow the lint rules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "clients/python/graftwork/v1"
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_stubs_are_not_stale(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "proto/generate.py", tmp_path], check=True, env=ENVIRONMENT, timeout=120)
    fresh = {path.name: path.read_text() for path in (tmp_path / "graftwork/v1").iterdir()}
    committed = {path.name: path.read_text() for path in STUBS.glob("*_pb2*")}
    assert set(fresh) == set(committed)
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, f"run `make proto`: {stale}"


def test_protos_follow_the_lint_rules() -> None:
    done = subprocess.run(["buf", "lint", ROOT / "proto"], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "service", ["GenerationService", "AdapterService", "TuningService", "StrategyService", "ServerService"]
)
def test_every_method_has_its_own_messages(service: str) -> None:
    from graftwork.v1 import adapters_pb2, generation_pb2, server_pb2, strategies_pb2, tuning_pb2

    files = (generation_pb2, adapters_pb2, tuning_pb2, strategies_pb2, server_pb2)
    descriptor = next(
        file.DESCRIPTOR.services_by_name[service] for file in files if service in file.DESCRIPTOR.services_by_name
    )
    for method in descriptor.methods:
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"
