"""Errors that cross an area's border, and their one form on the wire between processes.

    GraftworkServerError            has: code, reason, message, field, metadata
     +-- InvalidArgument            the request is wrong whatever the server's state
     +-- NotFound                   a name that is not there; never answered with the base instead
     +-- AlreadyExists
     +-- FailedPrecondition         the request is well-formed, but does not fit this base, artifact or state
     +-- ResourceExhausted          a queue or a pool is full; retry_after_ms says when to come back
     +-- Unavailable                a process is down or restarting; the same request may be sent again
     +-- DeadlineExceeded           the client let too much time pass
     +-- Cancelled
     +-- Internal                   a defect of ours

Each maps to the gRPC status code of the same name (front/rpc/interceptors.py). `reason` is an UPPER_SNAKE_CASE constant
that programs can match; `message` says what was wrong and what would be accepted, and names no path of the server.

Messages, fields and metadata quote what clients sent. An ErrorBody, which is in every error, makes them printable and
cuts them, so that each error can be logged, stored and sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from graftwork_server.printable import make_printable, printable

MESSAGE_CHARACTERS = 4000
FIELD_CHARACTERS = 300
MAX_VIOLATIONS = 1000


class Violation(msgspec.Struct, frozen=True):
    """One wrong field: its path in the request (`sampling.temperature`, `line 12`) and what would be accepted."""

    field: str
    description: str

    def __post_init__(self) -> None:
        make_printable(self, field=FIELD_CHARACTERS, description=MESSAGE_CHARACTERS)


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """An error as data, for messages between processes and for the registry."""

    code: str
    reason: str
    message: str
    violations: list[Violation] = []
    metadata: dict[str, str] = {}

    def __post_init__(self) -> None:
        make_printable(self, message=MESSAGE_CHARACTERS)
        for key, value in list(self.metadata.items()):
            self.metadata[key] = printable(value, FIELD_CHARACTERS)


class GraftworkServerError(Exception):
    """Base of all errors here. `code` is the gRPC status code's name."""

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        field: str = "",
        violations: Sequence[Violation] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        wrong = list(violations[:MAX_VIOLATIONS]) or ([Violation(field, message)] if field else [])
        self._body = ErrorBody(
            code=self.code, reason=reason, message=message, violations=wrong, metadata=dict(metadata or {})
        )
        super().__init__(self._body.message)

    @property
    def reason(self) -> str:
        """A constant that programs can match."""
        return self._body.reason

    @property
    def message(self) -> str:
        """What was wrong and what would be accepted."""
        return self._body.message

    @property
    def violations(self) -> list[Violation]:
        """Every wrong field."""
        return self._body.violations

    @property
    def metadata(self) -> dict[str, str]:
        """More for programs, such as retry_after_ms."""
        return self._body.metadata

    def body(self) -> ErrorBody:
        """This error as data."""
        return self._body


class InvalidArgument(GraftworkServerError):
    """The request is wrong whatever the server's state."""

    code = "INVALID_ARGUMENT"


class NotFound(GraftworkServerError):
    """A name that is not there."""

    code = "NOT_FOUND"


class AlreadyExists(GraftworkServerError):
    """A name that is taken."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(GraftworkServerError):
    """Well-formed, but it does not fit this base model, artifact or state."""

    code = "FAILED_PRECONDITION"


class ResourceExhausted(GraftworkServerError):
    """A queue or pool is full; metadata["retry_after_ms"] says when to come back, where that is known."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(GraftworkServerError):
    """A process is down or restarting; the same request may be sent again."""

    code = "UNAVAILABLE"


class DeadlineExceeded(GraftworkServerError):
    """The client let too much time pass."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(GraftworkServerError):
    """Ended because somebody asked for it."""

    code = "CANCELLED"


class Internal(GraftworkServerError):
    """A defect of ours."""

    code = "INTERNAL"


_BY_CODE: dict[str, type[GraftworkServerError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        Internal,
    )
}


def from_body(body: ErrorBody) -> GraftworkServerError:
    """The error that `body` came from, to be raised again in another process."""
    cls = _BY_CODE.get(body.code, Internal)
    return cls(body.message, reason=body.reason, violations=body.violations, metadata=body.metadata)


def body_of(error: BaseException) -> ErrorBody:
    """`error` as data; what is not one of ours becomes INTERNAL with its type and text."""
    if isinstance(error, GraftworkServerError):
        return error.body()
    return Internal(f"{type(error).__name__}: {error}", reason="INTERNAL").body()
