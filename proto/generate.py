"""Generates the committed stubs in clients/python/graftwork/v1 from the .proto files beside this script.

    python proto/generate.py [OUTPUT_FOLDER]

Writes messages, services and type stubs. `make proto` calls it; a test calls it into a temporary folder and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
DEFAULT_OUTPUT = HERE.parent / "clients" / "python"


def generate(output: Path) -> None:
    """Runs protoc over graftwork/v1/*.proto; raises RuntimeError if it fails."""
    sources = sorted(str(path.relative_to(HERE)) for path in HERE.glob("graftwork/v1/*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"--proto_path={HERE}",
            f"--proto_path={well_known}",
            f"--python_out={output}",
            f"--grpc_python_out={output}",
            f"--mypy_out=quiet:{output}",
            f"--mypy_grpc_out=quiet:{output}",
            *sources,
        ]
    )
    if code != 0:
        raise RuntimeError(f"protoc failed with exit code {code}")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT
    folder.mkdir(parents=True, exist_ok=True)
    generate(folder)
