"""When a failed call is sent again, and after how long. Pure decisions; the sync and the async client sleep on them."""

from __future__ import annotations

import random
import time

from graftwork.errors import APIError, DeadlineExceededError, ResourceExhaustedError, UnavailableError

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0
ATTACH_S = 3600.0
"""Deadline of one attachment to a job's events, so that no call is ever without one; the watch attaches again."""
REATTACH_S = 120.0
"""How long a watch goes on trying to come back to a server that is away."""
_HELD_S = 10.0


def backoff_s(failures: int) -> float:
    """Seconds to wait after the n-th failure: exponential, with full jitter so that clients spread out."""
    ceiling: float = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16))
    return random.uniform(0.0, ceiling)


def is_transient(error: APIError) -> bool:
    """True if the same call may succeed later: the server is away, or is busy and said when to come back."""
    if isinstance(error, ResourceExhaustedError):
        return error.retry_after_ms is not None
    return isinstance(error, UnavailableError)


class Attempts:
    """The attempts at one call, which share one deadline.

    retry: whether the call may be sent again at all. timeout: seconds for all attempts and the waits between them.
    """

    def __init__(self, *, retry: bool, max_retries: int, timeout: float) -> None:
        self._left = max_retries if retry else 0
        self._deadline = time.monotonic() + timeout
        self._failures = 0

    def remaining_s(self) -> float:
        """Seconds left before the deadline, at least 0."""
        return max(0.0, self._deadline - time.monotonic())

    def delay_after(self, error: APIError) -> float:
        """Seconds to wait before the next attempt. Raises error itself if there is to be none."""
        if self._left <= 0 or not is_transient(error):
            raise error
        self._left -= 1
        self._failures += 1
        delay = (error.retry_after_ms or 0) / 1000 + backoff_s(self._failures)
        if delay >= self.remaining_s():
            raise error
        return delay


class Watch:
    """Where a watch of a job's events stands, and whether it attaches again after a break.

    after_sequence: the last event that is known. timeout: seconds for the whole watch; None: no bound.
    """

    def __init__(self, *, after_sequence: int, timeout: float | None) -> None:
        self.last_sequence = after_sequence
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._attached_at = time.monotonic()
        self._away_since: float | None = None
        self._failures = 0

    def attach_timeout_s(self) -> float:
        """The deadline of the next attachment, in seconds from now."""
        self._attached_at = time.monotonic()
        if self._deadline is None:
            return ATTACH_S
        return max(0.0, min(ATTACH_S, self._deadline - time.monotonic()))

    def accept(self, sequence: int) -> bool:
        """Notes an event; False if it was seen before, which a re-attachment may repeat."""
        self._away_since, self._failures = None, 0
        if sequence <= self.last_sequence:
            return False
        self.last_sequence = sequence
        return True

    def timed_out(self) -> bool:
        """True once the time for the whole watch is over."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def delay_after(self, error: APIError) -> float:
        """Seconds to wait before attaching again. Raises error itself if that is not to be."""
        if isinstance(error, DeadlineExceededError):
            return 0.0  # only this attachment's deadline; the caller looks at timed_out() for the watch's own
        if not is_transient(error):
            raise error
        now = time.monotonic()
        if self._away_since is None or now - self._attached_at >= _HELD_S:
            # A quiet job sends nothing for long: an attachment that held was a sign of life, too.
            self._away_since, self._failures = now, 0
        if now - self._away_since >= REATTACH_S:
            raise error
        self._failures += 1
        delay = (error.retry_after_ms or 0) / 1000 + backoff_s(self._failures)
        return delay if self._deadline is None else max(0.0, min(delay, self._deadline - now))
