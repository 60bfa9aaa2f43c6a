"""Several sequences of one request in the engine, read as one stream."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self

import msgspec

from graftwork_server.wire.engine import Sampling, SequenceOutput

Start = Callable[[Sampling, bool], AsyncGenerator[SequenceOutput, None]]
"""Starts one sequence in the engine; true for the first one, which brings what there is once for all of them."""


def samplings_of(sampling: Sampling, count: int) -> list[Sampling]:
    """`sampling` for each of `count` sequences: the first as it is, the others with seeds made from its seed."""
    others = (msgspec.structs.replace(sampling, seed=_seed(sampling.seed, index)) for index in range(1, count))
    return [sampling, *others]


def _seed(seed: int, index: int) -> int:
    """63 bits that belong to this seed and index alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8]) >> 1


class Samples:
    """The outputs of all sequences as they come, each with its sequence's number.

    Use it in an async with block; leaving it ends every sequence that still runs. For a slow reader each sequence waits
    in the engine client, within its bound. The first error of a sequence ends all of them.
    """

    def __init__(self, start: Start, samplings: Sequence[Sampling]) -> None:
        self._start = start
        self._samplings = samplings
        self._outputs: asyncio.Queue[tuple[int, SequenceOutput | BaseException | None]] = asyncio.Queue(len(samplings))
        self._readers: list[asyncio.Task[None]] = []
        self._running: set[int] = set()
        """Sequences of which more is expected."""
        self._alone: AsyncGenerator[SequenceOutput, None] | None = None
        """One sequence is read without a task in between."""

    async def __aenter__(self) -> Self:
        if len(self._samplings) == 1:
            self._alone = self._start(self._samplings[0], True)
        else:
            self._running = set(range(len(self._samplings)))
            self._readers = [asyncio.create_task(self._read(index)) for index in range(len(self._samplings))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._alone is not None:
            await self._alone.aclose()
            return
        self._running.clear()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def end(self, index: int) -> None:
        """Ends one sequence; what it has sent already may still come."""
        if self._readers:
            self._running.discard(index)
            self._readers[index].cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, SequenceOutput]]:
        if self._alone is not None:
            async for output in self._alone:
                yield 0, output
            return
        while self._running:
            index, item = await self._outputs.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                self._running.discard(index)
            else:
                yield index, item

    async def _read(self, index: int) -> None:
        try:
            async with aclosing(self._start(self._samplings[index], index == 0)) as outputs:
                async for output in outputs:
                    await self._outputs.put((index, output))
        except Exception as error:
            await self._outputs.put((index, error))
        finally:
            # However it ended: who reads would wait for more of it. What we cancelled is not waited for any more.
            if index in self._running:
                await self._outputs.put((index, None))
