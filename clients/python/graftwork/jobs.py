"""Tuning jobs as futures: wait for the result, follow the events, cancel."""

# ruff: noqa: ASYNC109 - timeout is the deadline that gRPC sends to the server; asyncio.timeout would only stop waiting.

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

from graftwork.errors import APIError, JobFailedError, JobTimeoutError
from graftwork.requests import tuning as requests
from graftwork.transport.async_transport import AsyncTransport
from graftwork.transport.retries import Watch, backoff_s
from graftwork.transport.sync_transport import Transport
from graftwork.types import JobState, TuningEvent, TuningJobInfo, TuningProgress, TuningResult


class _JobView:
    """What a handle knows without asking the server: the job as it was last heard of."""

    def __init__(self, info: TuningJobInfo) -> None:
        self._info = info
        self._last_sequence = 0

    @property
    def info(self) -> TuningJobInfo:
        """The job as it was last heard of; refresh(), wait() and events() bring it up to date."""
        return self._info

    @property
    def id(self) -> str:
        """The job id."""
        return self._info.job_id

    @property
    def state(self) -> JobState:
        """Where the job is, as last heard of."""
        return self._info.state

    @property
    def done(self) -> bool:
        """True once the job is known to have ended, however it did."""
        return self._info.done

    @property
    def progress(self) -> TuningProgress | None:
        """The newest progress; None before the first step."""
        return self._info.progress

    @property
    def result(self) -> TuningResult | None:
        """What the job left behind; None unless it has succeeded and was refreshed or waited for since."""
        return self._info.result

    def _note(self, event: TuningEvent) -> None:
        """Brings the job up to date: state, progress and held-out loss follow what was streamed."""
        changes: dict[str, Any] = {}
        if event.state is not None:
            changes["state"] = event.state
        if event.progress is not None:
            changes["progress"] = event.progress
        if event.evaluation is not None:
            changes["validation_loss"] = event.evaluation.loss
        self._info = dataclasses.replace(self._info, **changes)
        self._last_sequence = max(self._last_sequence, event.sequence)

    def _outcome(self) -> TuningResult:
        if self._info.state != "succeeded" or self._info.result is None:
            raise JobFailedError(self._info)
        return self._info.result

    def _check_time(self, watch: Watch, timeout: float | None) -> None:
        if timeout is not None and watch.timed_out():
            raise JobTimeoutError(self._info, timeout)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state}>"


class TuningJob(_JobView):
    """A tuning job, for the synchronous client."""

    def __init__(self, transport: Transport, info: TuningJobInfo) -> None:
        super().__init__(info)
        self._transport = transport

    def refresh(self) -> Self:
        """Asks the server for the job's present state and returns this handle. Raises APIError."""
        self._info = self._transport.unary(requests.get_job(self._info.name))
        return self

    def cancel(self) -> Self:
        """Cancels the job, which then publishes nothing, and returns this handle. Raises APIError.

        FailedPreconditionError: it has ended already.
        """
        self._info = self._transport.unary(requests.cancel_job(self._info.name))
        return self

    def events(self, after_sequence: int = 0, *, timeout: float | None = None) -> Iterator[TuningEvent]:
        """The job's events with a higher sequence number, each once, until it has ended.

        Attaches again where it left off when the connection or the server breaks away. timeout: seconds for all of it,
        None: no bound. Raises APIError if the server stays away, JobTimeoutError after the timeout.
        """
        watch = Watch(after_sequence=after_sequence, timeout=timeout)
        while True:
            call = requests.watch_job(self._info.name, watch.last_sequence)
            stream = self._transport.stream(call, watch.attach_timeout_s())
            try:
                for event in stream:
                    if watch.accept(event.sequence):
                        self._note(event)
                        yield event
                return
            except APIError as error:
                self._check_time(watch, timeout)
                delay = watch.delay_after(error)
            finally:
                stream.cancel()
            time.sleep(delay)

    def wait(self, timeout: float | None = None) -> TuningResult:
        """Waits until the job has ended and returns its result. timeout: seconds, None: no bound.

        Raises JobFailedError if it failed or was cancelled, JobTimeoutError after the timeout (the job goes on), and
        APIError if the server stays away.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        rounds = 0
        while not self.refresh().done:
            if rounds:  # the events ended, yet the job did not: do not ask in a tight circle
                time.sleep(backoff_s(rounds))
            rounds += 1
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            for _ in self.events(self._last_sequence, timeout=left):
                pass
        return self._outcome()


class AsyncTuningJob(_JobView):
    """A tuning job, for the asyncio client."""

    def __init__(self, transport: AsyncTransport, info: TuningJobInfo) -> None:
        super().__init__(info)
        self._transport = transport

    async def refresh(self) -> Self:
        """As TuningJob.refresh."""
        self._info = await self._transport.unary(requests.get_job(self._info.name))
        return self

    async def cancel(self) -> Self:
        """As TuningJob.cancel."""
        self._info = await self._transport.unary(requests.cancel_job(self._info.name))
        return self

    async def events(self, after_sequence: int = 0, *, timeout: float | None = None) -> AsyncIterator[TuningEvent]:
        """As TuningJob.events, for async for."""
        watch = Watch(after_sequence=after_sequence, timeout=timeout)
        while True:
            call = requests.watch_job(self._info.name, watch.last_sequence)
            stream = self._transport.stream(call, watch.attach_timeout_s())
            try:
                async for event in stream:
                    if watch.accept(event.sequence):
                        self._note(event)
                        yield event
                return
            except APIError as error:
                self._check_time(watch, timeout)
                delay = watch.delay_after(error)
            finally:
                stream.cancel()
            await asyncio.sleep(delay)

    async def wait(self, timeout: float | None = None) -> TuningResult:
        """As TuningJob.wait."""
        deadline = None if timeout is None else time.monotonic() + timeout
        rounds = 0
        while not (await self.refresh()).done:
            if rounds:
                await asyncio.sleep(backoff_s(rounds))
            rounds += 1
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            async for _ in self.events(self._last_sequence, timeout=left):
                pass
        return self._outcome()
