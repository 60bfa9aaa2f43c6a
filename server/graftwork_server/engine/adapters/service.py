"""Loading, unloading and pinning as it is asked for: by the front's calls, and by sequences that need an adapter.

Everything here runs in the step thread. What is asked for and what came of it is in the adapter's record; whoever
waits for a load, or for an adapter's last lease to end, is answered between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from graftwork_server.engine.adapters.loaded import LoadedAdapter
from graftwork_server.engine.adapters.loader import Loader, Result
from graftwork_server.engine.adapters.record import AdapterRecord
from graftwork_server.engine.engine import Engine
from graftwork_server.engine.outbox import Outbox
from graftwork_server.engine.plugin_calls import PluginCalls
from graftwork_server.errors import ErrorBody, FailedPrecondition, GraftworkServerError, body_of
from graftwork_server.types import AdapterRef
from graftwork_server.wire.engine import Load, LoadedChanged, LoadReply, Pin, Pinned, Unload, Unloaded

log = logging.getLogger("graftwork.engine")


class AdapterService:
    """The adapters of an engine, asked for by digest."""

    def __init__(
        self, engine: Engine, plugins: PluginCalls, outbox: Outbox, between_steps: Callable[[Callable[[], None]], None]
    ) -> None:
        """between_steps: runs work in the step thread; called from any."""
        self._engine = engine
        self._pool = engine.adapters
        self._outbox = outbox
        self._loader = Loader(
            plugins.read, plugins.bind, self._pool, lambda *ended: between_steps(lambda: self._end_load(*ended))
        )
        self._waiting: set[AdapterRecord] = set()
        """With calls, or a load under way: what has to be looked after between steps."""
        self._unloading: dict[LoadedAdapter, list[int]] = {}
        """Calls that wait for an adapter's last lease to end."""
        self._told = 0
        """The pool's generation that the front knows of."""

    # ------------------------------------------------------------------------------------------ calls

    def load(self, message: Load) -> None:
        """Loads an adapter for a client; answered when it is there."""
        report = self._pool.report(message.adapter.digest)
        if report is not None:
            self.tell_loaded()
            report = msgspec.structs.replace(report, load_ms=0.0, already_loaded=True)
            self._outbox.reply(message.call_id, LoadReply(report=report))
            return
        self.ensure_loaded(message.adapter).load_calls.append(message.call_id)

    def unload(self, message: Unload) -> None:
        """Unloads an adapter for a client; answered when its place is free."""
        record = self._pool.record(message.digest)
        record.unload_calls.append(message.call_id)
        self._waiting.add(record)
        if not record.is_loading:
            self._unload(record)

    def pin(self, message: Pin) -> None:
        """Pins these adapters and no others."""
        self._pool.pin(message.digests)
        self._outbox.reply(message.call_id, Pinned())

    # ------------------------------------------------------------------------------------------ sequences

    def ensure_loaded(self, adapter: AdapterRef) -> AdapterRecord:
        """Starts a load unless one is under way; it is needed now."""
        record = self._pool.record(adapter.digest)
        if record.is_loading:
            record.set_due(True)
        else:
            self._start(record, adapter, is_due=True)
        return record

    def load_ahead(self, adapter: AdapterRef) -> None:
        """Starts a load for a sequence that may have to wait for other reasons too."""
        record = self._pool.record(adapter.digest)
        if not record.is_loading and record.leasable is None:
            self._start(record, adapter, is_due=False)

    def after_step(self) -> None:
        """What may have changed since it was last called: who still waits for loads, whose last lease has ended."""
        loading = [record for record in self._waiting if record.is_loading]
        if loading:
            wanted = self._pool.wanted = self._engine.waited_for()
            for record in loading:
                if not record.load_calls and record.digest not in wanted:
                    record.set_due(False)
        for record in [record for record in self._waiting if record.unload_calls and not record.is_loading]:
            self._unload(record)
        self.tell_loaded()
        for adapter in [adapter for adapter in self._unloading if adapter.gone]:
            for call_id in self._unloading.pop(adapter):
                self._outbox.reply(call_id, Unloaded(was_loaded=True))

    def give_up(self) -> None:
        """No load is needed any more."""
        self._loader.give_up()

    def tell_loaded(self) -> None:
        """Tells the front what is loaded, if that changed. Before any answer that depends on it: whoever asked finds
        the list as the answer says."""
        if self._pool.generation != self._told:
            self._told = self._pool.generation
            self._outbox.send(LoadedChanged(digests=self._pool.digests()))

    # ------------------------------------------------------------------------------------------ ends

    def _start(self, record: AdapterRecord, adapter: AdapterRef, *, is_due: bool) -> None:
        record.queue(adapter, is_due=is_due)
        self._waiting.add(record)
        self._loader.start(record)

    def _end_load(self, record: AdapterRecord, result: Result) -> None:
        source = record.source
        if isinstance(result, BaseException):
            self._fail(record, error_body(result))
        elif result is not None:
            record.end_load()
            self._engine.arrived(result)
            self.tell_loaded()
            for call_id in record.take_calls():
                self._outbox.reply(call_id, LoadReply(report=result.report))
        else:
            record.end_load()
            if record.load_calls and source is not None:
                # They came while it was loaded ahead of time, which found no room.
                self._start(record, source, is_due=True)
        self._look_away(record)

    def _fail(self, record: AdapterRecord, error: ErrorBody) -> None:
        log.warning("adapter %s could not be loaded: %s", record.digest[:19], error.message)
        record.end_load(error)
        for call_id in record.take_calls():
            self._outbox.reply(call_id, error)
        if failed := self._engine.fail_waiting(record.digest, error):
            self._outbox.publish(failed)
        record.end_load()

    def _unload(self, record: AdapterRecord) -> None:
        calls, record.unload_calls = record.unload_calls, []
        answer: Unloaded | ErrorBody = Unloaded(was_loaded=False)
        if record.is_pinned:
            pinned = FailedPrecondition("the adapter is pinned; unpin it first", reason="ADAPTER_PINNED", field="name")
            answer = body_of(pinned)
        elif (adapter := self._pool.unload(record.digest)) is not None:
            self._unloading.setdefault(adapter, []).extend(calls)
            calls = []
        self.tell_loaded()
        for call_id in calls:
            self._outbox.reply(call_id, answer)
        self._look_away(record)

    def _look_away(self, record: AdapterRecord) -> None:
        """Once nobody waits for anything of a record."""
        if not (record.is_loading or record.load_calls or record.unload_calls):
            self._waiting.discard(record)
            self._pool.forget(record)


def error_body(error: BaseException) -> ErrorBody:
    """`error` as data; what is not one of ours is a defect, and only here is known where it came from."""
    if not isinstance(error, GraftworkServerError):
        log.error("a call failed in the engine", exc_info=error)
    return body_of(error)
