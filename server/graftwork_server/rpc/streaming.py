"""What client-streaming methods share: the first message, the size of chunks, blocking work that must not be torn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from graftwork_server.errors import InvalidArgument

MAX_CHUNK_BYTES = 1 << 20


class Streamed(Protocol):
    """A request with a oneof called payload."""

    def WhichOneof(self, oneof_group: Any) -> Any:
        """Name of the field that is set."""


S = TypeVar("S", bound=Streamed)
T = TypeVar("T")


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


async def to_its_end(work: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """Blocking work in a thread, waited for even if the call is cancelled meanwhile: what follows - removing a folder,
    releasing a lease - must not meet a thread that is still at it."""
    running = asyncio.ensure_future(asyncio.to_thread(partial(work, *arguments, **keywords)))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        running.exception()  # nobody is left to hear of it
        raise
