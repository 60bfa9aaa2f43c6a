"""What client-streaming methods share: the first message, the size of chunks, how many are open."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from graftwork_server.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from graftwork_server.logs import client

MAX_CHUNK_BYTES = 1 << 20


class Streamed(Protocol):
    """A request with a oneof called payload."""

    def WhichOneof(self, oneof_group: Any) -> Any:
        """Name of the field that is set."""


S = TypeVar("S", bound=Streamed)


class Uploads:
    """Client streams: how many may be open, of one client and in all, and for how long each may send nothing.

    An open one holds a file and a place of staging/; one that stalls would hold them for ever.
    """

    def __init__(self, most: int, most_per_client: int, idle_seconds: float) -> None:
        self._most = most
        self._most_per_client = most_per_client
        self._idle_seconds = idle_seconds
        self._open: Counter[str] = Counter()

    @contextmanager
    def open(self, requests: AsyncIterator[S]) -> Iterator[AsyncIterator[S]]:
        """The messages of a stream, which counts as open while the block runs.

        Raises ResourceExhausted (TOO_MANY_UPLOADS); the messages raise DeadlineExceeded (UPLOAD_IDLE).
        """
        of = client.get()
        if self._open[of] >= self._most_per_client or self._open.total() >= self._most:
            raise ResourceExhausted(
                f"{self._open[of]} uploads of this client are open, {self._open.total()} in all; at most "
                f"{self._most_per_client} and {self._most} are accepted",
                reason="TOO_MANY_UPLOADS",
                metadata={"retry_after_ms": "1000"},
            )
        self._open[of] += 1
        try:
            yield self._in_time(requests)
        finally:
            self._open[of] -= 1
            if not self._open[of]:
                del self._open[of]

    async def _in_time(self, requests: AsyncIterator[S]) -> AsyncIterator[S]:
        messages = aiter(requests)
        while True:
            try:
                async with asyncio.timeout(self._idle_seconds):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the upload sent nothing for {self._idle_seconds:g} s", reason="UPLOAD_IDLE"
                ) from None
            yield message


async def first_payload(requests: AsyncIterator[S], expected: str) -> S:
    """The first message of a stream. Raises InvalidArgument unless it carries `expected`."""
    first = await anext(aiter(requests), None)
    if first is None or first.WhichOneof("payload") != expected:
        raise InvalidArgument(
            f"the first message must carry {expected!r}", reason="UPLOAD_OUT_OF_ORDER", field=expected
        )
    return first


def check_chunk(data: bytes, field: str) -> None:
    """Raises InvalidArgument for more than 1 MiB."""
    if len(data) > MAX_CHUNK_BYTES:
        raise InvalidArgument(
            f"a message carries at most {MAX_CHUNK_BYTES} bytes, not {len(data)}", reason="CHUNK_TOO_LARGE", field=field
        )
