"""The id of a call, which is sent beside its request and stands in the server's log."""

from __future__ import annotations

import uuid
from typing import TypeAlias

Metadata: TypeAlias = tuple[tuple[str, str], ...]
REQUEST_ID_KEY = "x-request-id"


def new_request_id() -> str:
    """A fresh id: 32 hexadecimal characters."""
    return uuid.uuid4().hex


def call_metadata(request_id: str) -> Metadata:
    """What is sent beside each request."""
    return ((REQUEST_ID_KEY, request_id),)
