"""Everything that this package raises.

GraftworkError
 ├─ APIError                    the server, or the way to it, refused a call
 │   ├─ InvalidArgumentError        INVALID_ARGUMENT      the request itself is wrong; field_violations say where
 │   ├─ OutOfRangeError             OUT_OF_RANGE          past the end of something
 │   ├─ FailedPreconditionError     FAILED_PRECONDITION   right in form, but not in this state of the server
 │   ├─ NotFoundError               NOT_FOUND             no such adapter, version, data set, job or strategy
 │   ├─ AlreadyExistsError          ALREADY_EXISTS        the id is taken
 │   ├─ AbortedError                ABORTED               lost against a concurrent call
 │   ├─ ResourceExhaustedError      RESOURCE_EXHAUSTED    too busy or too large; retry_after_ms where the server said
 │   ├─ UnauthenticatedError        UNAUTHENTICATED       no valid credentials
 │   ├─ PermissionDeniedError       PERMISSION_DENIED     valid credentials without the right to do this
 │   ├─ UnavailableError            UNAVAILABLE           server unreachable, restarting or shutting down
 │   ├─ DeadlineExceededError       DEADLINE_EXCEEDED     timeout passed before the answer came
 │   ├─ CancelledError              CANCELLED             the call was cancelled
 │   ├─ UnimplementedError          UNIMPLEMENTED         the server is older than this client
 │   ├─ DataLossError               DATA_LOSS             stored bytes are damaged
 │   ├─ InternalError               INTERNAL              a defect of the server, or an answer cut short
 │   └─ UnknownError                UNKNOWN               no more is known
 ├─ UploadError                 a folder or file cannot be sent as it is; nothing was sent
 ├─ JobFailedError              a tuning job ended as failed or cancelled
 └─ JobTimeoutError             a tuning job had not ended in time; it goes on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from graftwork.types import TuningJobInfo


class GraftworkError(Exception):
    """Base of every error of this package."""


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request.

    field: its path in the request, e.g. "sampling.temperature"; messages name the argument, temperature.
    description: what is wrong and what would be accepted.
    """

    field: str
    description: str


_WORDS = (
    ("sampling.structured_output.", ""),
    ("sampling.", ""),
    ("spec.config.", "config."),
    ("spec.adapter_id", "adapter"),
    ("spec.validation_dataset", "validation"),
    ("spec.", ""),
    ("upload.", ""),
    ("check.", ""),
    ("tools_json", "tools"),
)
"""How the paths of requests begin, and what this package calls the same."""


def in_words(field: str) -> str:
    """A field's path in a request as the argument that a caller knows: "sampling.top_p" is top_p."""
    for path, word in _WORDS:
        if field.startswith(path):
            return word + field.removeprefix(path)
    return field


class APIError(GraftworkError):
    """A call failed.

    code: the gRPC status as a name, e.g. "NOT_FOUND".
    message: what went wrong, in one sentence, without codes or ids.
    reason: the machine-readable reason, e.g. "ADAPTER_NOT_FOUND"; "" where the server gave none.
    metadata: further facts that belong to the reason.
    field_violations: which fields of the request are wrong; empty where it is not about fields.
    request_id: id of the call, the same in the server's log; known even if no answer came.
    retry_after_ms: how long the server asks to wait before the next attempt; None where it did not say.
    """

    default_code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field_violations: Sequence[FieldViolation] = (),
        request_id: str = "",
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self._sent = message
        self.code = code or self.default_code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.field_violations = tuple(field_violations)
        self.message = self.spoken(in_words)
        self.request_id = request_id
        self.retry_after_ms = retry_after_ms

    def spoken(self, word: Callable[[str], str]) -> str:
        """The message, in which each path of a field is what `word` makes of it."""
        text = self._sent
        for field in sorted({violation.field for violation in self.field_violations}, key=len, reverse=True):
            if in_words(field) != field:
                text = text.replace(field, word(field))
        return text

    @property
    def facts(self) -> str:
        """Code, reason and request id."""
        facts = [self.code]
        if self.reason:
            facts.append(f"reason {self.reason}")
        if self.request_id:
            facts.append(f"request {self.request_id}")
        return f"[{', '.join(facts)}]"

    @property
    def unsaid_violations(self) -> tuple[FieldViolation, ...]:
        """The field violations that the message does not tell already; of several with one description it tells one."""
        said: set[str] = set()
        unsaid = []
        for violation in self.field_violations:
            if violation.description in self._sent and violation.description not in said:
                said.add(violation.description)
            else:
                unsaid.append(violation)
        return tuple(unsaid)

    def __str__(self) -> str:
        said = [f"{self.message} {self.facts}"]
        return "; ".join([*said, *(f"{in_words(v.field)}: {v.description}" for v in self.unsaid_violations)])


class InvalidArgumentError(APIError):
    """The request itself is wrong; field_violations say where and what would be accepted."""

    default_code = "INVALID_ARGUMENT"


class OutOfRangeError(APIError):
    """The request reaches past the end of something."""

    default_code = "OUT_OF_RANGE"


class FailedPreconditionError(APIError):
    """The request is right in form, but does not fit the server's state or its base model."""

    default_code = "FAILED_PRECONDITION"


class NotFoundError(APIError):
    """No such adapter, version, data set, job or strategy."""

    default_code = "NOT_FOUND"


class AlreadyExistsError(APIError):
    """The id is taken."""

    default_code = "ALREADY_EXISTS"


class AbortedError(APIError):
    """The call lost against a concurrent one."""

    default_code = "ABORTED"


class ResourceExhaustedError(APIError):
    """The server is too busy, or the request is too large; retry_after_ms is set where waiting helps."""

    default_code = "RESOURCE_EXHAUSTED"


class UnauthenticatedError(APIError):
    """No valid credentials."""

    default_code = "UNAUTHENTICATED"


class PermissionDeniedError(APIError):
    """The credentials are valid but do not allow this."""

    default_code = "PERMISSION_DENIED"


class UnavailableError(APIError):
    """The server cannot be reached, restarts or shuts down."""

    default_code = "UNAVAILABLE"


class DeadlineExceededError(APIError):
    """The timeout of the call passed before the answer came."""

    default_code = "DEADLINE_EXCEEDED"


class CancelledError(APIError):
    """The call was cancelled."""

    default_code = "CANCELLED"


class UnimplementedError(APIError):
    """The server does not know this method; it is older than this client."""

    default_code = "UNIMPLEMENTED"


class DataLossError(APIError):
    """Stored bytes are damaged."""

    default_code = "DATA_LOSS"


class InternalError(APIError):
    """A defect of the server, or an answer that was cut short."""

    default_code = "INTERNAL"


class UnknownError(APIError):
    """The server, or the way to it, failed without saying how."""

    default_code = "UNKNOWN"


class UploadError(GraftworkError):
    """A folder or file cannot be sent as it is; nothing was published."""


class JobFailedError(GraftworkError):
    """A tuning job ended as failed or cancelled.

    job: the job as it was when it ended; job.error says why it failed, job.state which of the two it is.
    """

    def __init__(self, job: TuningJobInfo) -> None:
        super().__init__(f"tuning job {job.job_id} {job.state}" + (f": {job.error}" if job.error else ""))
        self.job = job


class JobTimeoutError(GraftworkError, TimeoutError):
    """A tuning job had not ended within the timeout. The job goes on.

    job: the job as it was last known.
    """

    def __init__(self, job: TuningJobInfo, timeout: float) -> None:
        super().__init__(f"tuning job {job.job_id} has not ended within {timeout:g} s; it goes on ({job.state})")
        self.job = job


BY_CODE: Mapping[str, type[APIError]] = {cls.default_code: cls for cls in APIError.__subclasses__()}
"""The class of each gRPC status name."""
