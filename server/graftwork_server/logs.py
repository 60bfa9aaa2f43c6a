"""Log lines of the front on stderr, as text or JSON, each with the id of the request that it belongs to."""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
import sys

from graftwork_server.printable import printable

LINE_CHARACTERS = 16_000
TRACEBACK_CHARACTERS = 200_000

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Id of the request that is being served; "" outside of one."""

client: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")
"""Host of the client whose request is being served; "" outside of one."""


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
        text = f"{' '.join(fields)} {self.message(record)}"
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
            "exception": self.exception(record),
        }
        return json.dumps({key: value for key, value in entry.items() if value is not None}, ensure_ascii=False)


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
