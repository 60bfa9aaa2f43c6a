"""Text of strangers can be logged, stored and sent, whatever is in it, wherever it goes."""

from __future__ import annotations

import io
import json
import logging

import msgspec
import pytest
from google.rpc import error_details_pb2

from graftwork_server import logs
from graftwork_server.errors import ErrorBody, InvalidArgument, Violation, body_of, from_body
from graftwork_server.front.rpc.interceptors import to_status
from graftwork_server.printable import printable
from graftwork_server.tuning.data import DatasetReport
from graftwork_server.tuning.data.report import LineError
from graftwork_server.wire.tuning import Note

HOSTILE = [
    "\ud800",
    "a\udfffb",
    "\x00",
    "\x1b[31m",
    "one\ntwo\r",
    "\u202eback",
    "\u2066x",
    "\u200b",
    "\x7f",
    "\x85",
    "\u2028",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_everything_that_quotes_strangers_is_visible_and_can_be_sent(text: str) -> None:
    error = InvalidArgument(
        f"bad {text}", reason="X", violations=[Violation(text, f"is {text}")], metadata={"file": text}
    )
    texts = [error.message, str(error), *(part for one in error.violations for part in (one.field, one.description))]
    texts += [error.metadata["file"], body_of(ValueError(text)).message, Note(text=text).text]
    texts += [LineError(3, text).reason, ErrorBody(code="INTERNAL", reason="X", message=text).message]
    for shown in texts:
        assert shown.isprintable()
        assert shown.encode()
        assert text not in shown
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(error.body()), type=ErrorBody)
    assert from_body(again).message == error.message, "what is printable stays as it is"
    status = to_status(error)
    assert status.message == error.message
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.metadata["file"] == printable(text, 300)


def test_text_that_people_write_stays() -> None:
    for text in ("naïve café", "日本語", "Привет", "עברית", "🦊 e\u0301", "a b"):
        assert printable(text, 100) == text


def test_no_text_is_too_long() -> None:
    assert printable("x" * 10_000_000, 50) == "x" * 47 + "..."
    assert len(printable("\ud800" * 10_000_000, 50)) == 50
    error = InvalidArgument("x" * 10**7, reason="X", violations=[Violation("y" * 10**7, "z" * 10**7)] * 5000)
    assert len(msgspec.msgpack.encode(error.body())) < 5 << 20
    assert DatasetReport.__struct_fields__, "reports hold LineErrors, which are cut"
    assert len(LineError(1, "x" * 10**7).reason) < 10_000


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_log_line_stays_one_line(format: str, text: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.set_up("info", format)
        root.handlers[0].setStream(stream)  # type: ignore[attr-defined]
        logging.getLogger("x").warning("got %s.", text)
        try:
            raise ValueError(text)
        except ValueError:
            logging.getLogger("x").exception("failed")
    finally:
        root.handlers[:], root.level = handlers, level
    stream.flush()
    written = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    first = written.split("\n")[0]
    assert printable(text, 100) in (json.loads(first)["message"] if format == "json" else first)
    assert text not in written or text == "\n"
