"""Log lines on stderr, as text or JSON, each with the id of the request that it belongs to.

An event has a sentence of few words and fields: `log_event(log, "job created", job=..., adapter=...)`. As text they
follow as key=value, as JSON they are keys of the object. The line of a call has what the call noted on its way.
"""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from graftwork_server.printable import printable

LINE_CHARACTERS = 16_000
TRACEBACK_CHARACTERS = 200_000

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Id of the request that is being served; "" outside of one."""

client: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")
"""Host of the client whose request is being served; "" outside of one."""


_FIELDS, _SAID = "graftwork_fields", "graftwork_said"


class Call:
    """The call that is being served: when it began, and what its line in the log is to say."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.fields: dict[str, Any] = {}

    @property
    def milliseconds(self) -> float:
        """Since it began."""
        return round((time.monotonic() - self.begun) * 1000, 1)


_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("call", default=None)


def begin_call() -> Call:
    """The call that this task serves from now on."""
    call = Call()
    _call.set(call)
    return call


def note(**fields: Any) -> None:
    """Adds to what the line of the present call says; outside of one, nothing happens."""
    call = _call.get()
    if call is not None:
        call.fields.update(fields)


def note_first_token() -> None:
    """Notes how long the present call took to its first token, once."""
    call = _call.get()
    if call is not None and "first_token_ms" not in call.fields:
        call.fields["first_token_ms"] = call.milliseconds


def log_event(
    log: logging.Logger, what: str, level: int = logging.INFO, /, said: Mapping[str, Any] | None = None, **fields: Any
) -> None:
    """Logs that something happened. `fields`: plain values; None and "" are left out. `said`: those in the sentence."""
    given = {name: value for name, value in fields.items() if value not in (None, "")}
    log.log(level, what, extra={_FIELDS: given, _SAID: said or {}})


def _fields(record: logging.LogRecord, which: str) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, which, {})
    return fields


class _Formatter(logging.Formatter):
    """What is logged may quote strangers: it forges no line, and it can always be written."""

    def message(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage(), LINE_CHARACTERS)

    def exception(self, record: logging.LogRecord) -> str | None:
        if not record.exc_info:
            return None
        return printable(self.formatException(record.exc_info), TRACEBACK_CHARACTERS, lines=True)


class _TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = [_time(record), record.levelname, record.name]
        if identifier := request_id.get():
            fields.append(f"[{identifier}]")
        told = "".join(f" {name}={value}" for name, value in _fields(record, _FIELDS).items())
        text = f"{' '.join(fields)} {self.message(record)}{printable(told, LINE_CHARACTERS)}"
        exception = self.exception(record)
        return f"{text}\n{exception}" if exception else text


class _JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id.get() or None,
            "message": self.message(record),
            **{name: _plain(value) for which in (_SAID, _FIELDS) for name, value in _fields(record, which).items()},
            "exception": self.exception(record),
        }
        return json.dumps({key: value for key, value in entry.items() if value is not None}, ensure_ascii=False)


def _plain(value: Any) -> Any:
    return printable(value, LINE_CHARACTERS) if isinstance(value, str) else value


def set_up(level: str, format: str) -> None:
    """Sends everything of at least `level` to stderr; `format` is "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Libraries' chatter about their own inner life is no news for an operator.
    for name in ("asyncio", "grpc", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def _time(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
