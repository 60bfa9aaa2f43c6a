"""Frames: how a message crosses a socket."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import msgspec

from graftwork_server.errors import InvalidArgument

MAX_FRAME_BYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: Any) -> bytes:
    """`message` as one frame.

    Raises InvalidArgument (MESSAGE_NOT_SENDABLE) for what no frame can hold: text that is no Unicode, numbers of more
    than 64 bits, values nested too deep, too many bytes. Only who waits for `message` may suffer from that.
    """
    try:
        body = _encoder.encode(message)
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise _not_sendable(message, str(error)) from error
    if len(body) > MAX_FRAME_BYTES:
        raise _not_sendable(message, f"it has {len(body)} bytes; {MAX_FRAME_BYTES} are accepted")
    return _LENGTH.pack(len(body)) + body


def _not_sendable(message: Any, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"what was asked for cannot be sent between the server's processes ({type(message).__name__}): {why}",
        reason="MESSAGE_NOT_SENDABLE",
    )


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame's body. Raises asyncio.IncompleteReadError at the end of the stream."""
    return await reader.readexactly(_body_length(await reader.readexactly(_LENGTH.size)))


def receive_frame(sock: socket.socket) -> bytes:
    """The next frame's body, blocking. Raises EOFError at the end of the stream."""
    return bytes(_receive_exactly(sock, _body_length(_receive_exactly(sock, _LENGTH.size))))


def _body_length(header: bytes | bytearray) -> int:
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return int(length)


def _receive_exactly(sock: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view.nbytes:
        received = sock.recv_into(view)
        if received == 0:
            raise EOFError("the other side closed the connection")
        view = view[received:]
    return buffer
