"""Graftwork's Python client: one base model, many variants served and tuned by name.

import graftwork

with graftwork.Client() as client:
    print(client.generate("base", "Once upon a time", max_tokens=32).text)
"""

from __future__ import annotations

TYPE_CHECKING = False
"""As typing has it. Nothing is imported here: until the command line has said what Ctrl-C does, it is a traceback."""
if TYPE_CHECKING:
    from typing import Any

    from graftwork.async_client import AsyncClient
    from graftwork.client import Client
    from graftwork.errors import (
        AbortedError,
        AlreadyExistsError,
        APIError,
        CancelledError,
        DataLossError,
        DeadlineExceededError,
        FailedPreconditionError,
        FieldViolation,
        GraftworkError,
        InternalError,
        InvalidArgumentError,
        JobFailedError,
        JobTimeoutError,
        NotFoundError,
        OutOfRangeError,
        PermissionDeniedError,
        ResourceExhaustedError,
        UnauthenticatedError,
        UnavailableError,
        UnimplementedError,
        UnknownError,
        UploadError,
    )
    from graftwork.jobs import AsyncTuningJob, TuningJob
    from graftwork.requests.sampling import SamplingOptions
    from graftwork.streams import AsyncGenerationStream, GenerationStream
    from graftwork.types import (
        Adapter,
        BaseModelInfo,
        Classification,
        ClassificationResult,
        Completion,
        Dataset,
        DatasetReport,
        Embedding,
        EmbeddingResult,
        Generation,
        GenerationChunk,
        LabelScore,
        LineError,
        LineErrorKind,
        LoadReport,
        Message,
        Score,
        ServerInfo,
        ServerLimits,
        Strategy,
        Tokenization,
        TokenLogprob,
        TopLogprob,
        TuningEstimate,
        TuningEvaluation,
        TuningEvent,
        TuningJobInfo,
        TuningProgress,
        TuningResult,
        TuningSpec,
        Usage,
    )
    from graftwork.version import VERSION as __version__

__all__ = [
    "APIError",
    "AbortedError",
    "Adapter",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncGenerationStream",
    "AsyncTuningJob",
    "BaseModelInfo",
    "CancelledError",
    "Classification",
    "ClassificationResult",
    "Client",
    "Completion",
    "DataLossError",
    "Dataset",
    "DatasetReport",
    "DeadlineExceededError",
    "Embedding",
    "EmbeddingResult",
    "FailedPreconditionError",
    "FieldViolation",
    "Generation",
    "GenerationChunk",
    "GenerationStream",
    "GraftworkError",
    "InternalError",
    "InvalidArgumentError",
    "JobFailedError",
    "JobTimeoutError",
    "LabelScore",
    "LineError",
    "LineErrorKind",
    "LoadReport",
    "Message",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "ResourceExhaustedError",
    "SamplingOptions",
    "Score",
    "ServerInfo",
    "ServerLimits",
    "Strategy",
    "TokenLogprob",
    "Tokenization",
    "TopLogprob",
    "TuningEstimate",
    "TuningEvaluation",
    "TuningEvent",
    "TuningJob",
    "TuningJobInfo",
    "TuningProgress",
    "TuningResult",
    "TuningSpec",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnknownError",
    "UploadError",
    "Usage",
    "__version__",
]

_MODULES = ("async_client", "client", "errors", "jobs", "requests.sampling", "streams", "types")


def __getattr__(name: str) -> Any:
    """Imports everything when something is first asked for: the command line must say what Ctrl-C does before that."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    for module in _MODULES:
        content = vars(import_module(f"{__name__}.{module}"))
        globals().update({exported: content[exported] for exported in __all__ if exported in content})
    globals()["__version__"] = import_module(f"{__name__}.version").VERSION
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
