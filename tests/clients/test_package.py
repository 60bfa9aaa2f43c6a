"""The package as a whole: its names, what importing it brings, docstrings, and that it speaks the proto as it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import graftwork
from graftwork.v1 import adapters_pb2, generation_pb2, server_pb2, strategies_pb2, tuning_pb2

NAMES = """
__version__ AbortedError Adapter AlreadyExistsError APIError AsyncClient AsyncGenerationStream AsyncTuningJob
BaseModelInfo CancelledError Classification ClassificationResult Client Completion DataLossError Dataset DatasetReport
DeadlineExceededError Embedding EmbeddingResult FailedPreconditionError FieldViolation Generation GenerationChunk
GenerationStream GraftworkError InternalError InvalidArgumentError JobFailedError JobTimeoutError LabelScore LineError
LineErrorKind LoadReport Message NotFoundError OutOfRangeError PermissionDeniedError ResourceExhaustedError
SamplingOptions Score ServerInfo ServerLimits Strategy Tokenization TokenLogprob TopLogprob TuningEstimate
TuningEvaluation TuningEvent TuningJob TuningJobInfo TuningProgress TuningResult TuningSpec UnauthenticatedError
UnavailableError UnimplementedError UnknownError UploadError Usage
"""


def test_exported_names_are_pinned() -> None:
    assert sorted(graftwork.__all__) == sorted(NAMES.split())
    assert all(hasattr(graftwork, name) for name in graftwork.__all__)


def test_package_ships_its_types() -> None:
    assert graftwork.__file__ is not None
    assert (Path(graftwork.__file__).parent / "py.typed").exists()


def test_importing_brings_neither_torch_nor_the_server() -> None:
    check = (
        "import sys, graftwork, graftwork.cli.app; "
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('torch', 'transformers', 'graftwork_server', 'graftwork_plugins')], 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[0] == "[] False"


def modules() -> list[str]:
    found = pkgutil.walk_packages(graftwork.__path__, "graftwork.")
    return [module.name for module in found if not module.name.startswith(("graftwork.v1", "graftwork.__main__"))]


@pytest.mark.parametrize("name", modules())
def test_public_things_have_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, name
    for label, item in vars(module).items():
        if label.startswith("_") or getattr(item, "__module__", None) != name:
            continue
        if inspect.isfunction(item) or inspect.isclass(item):
            assert item.__doc__, f"{name}.{label}"
        if inspect.isclass(item):
            for method_name, method in vars(item).items():
                plain = inspect.isfunction(method) or isinstance(method, property)
                if plain and not method_name.startswith("_") and name != "graftwork.transport.calls":
                    assert method.__doc__, f"{name}.{label}.{method_name}"


def test_every_method_of_the_proto_has_a_call() -> None:
    assert graftwork.__file__ is not None
    folder = Path(graftwork.__file__).parent / "requests"
    source = "".join(file.read_text() for file in folder.glob("*.py"))
    for messages in (adapters_pb2, generation_pb2, server_pb2, strategies_pb2, tuning_pb2):
        for service in messages.DESCRIPTOR.services_by_name.values():
            assert f'"/{service.full_name}/"' in source
            for method in service.methods:
                assert f'"{method.name}"' in source, method.full_name


def test_twins_have_the_same_methods_and_arguments() -> None:
    pairs: list[tuple[type, type]] = [
        (graftwork.Client, graftwork.AsyncClient),
        (graftwork.TuningJob, graftwork.AsyncTuningJob),
    ]
    for resource in ("adapters", "datasets", "server", "strategies", "tuning"):
        module = importlib.import_module(f"graftwork.resources.{resource}")
        name = resource.capitalize()
        pairs.append((getattr(module, name), getattr(module, f"Async{name}")))
    for plain, twin in pairs:
        names = {name for name in vars(plain) if not name.startswith("_")}
        assert names == {name for name in vars(twin) if not name.startswith("_")}
        for name in names:
            if inspect.isfunction(vars(plain)[name]):
                ours, theirs = inspect.signature(vars(plain)[name]), inspect.signature(vars(twin)[name])
                assert ours.parameters == theirs.parameters, f"{plain.__name__}.{name}"
