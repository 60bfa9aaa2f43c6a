"""Page tokens: where a listing goes on, in a form that clients hand back and do not read."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from graftwork_server.errors import InvalidArgument

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
_CHECK_BYTES = 6

T = TypeVar("T")


def check_page_size(page_size: int) -> int:
    """The page size to use; 0 means 100. Raises InvalidArgument naming page_size outside 0 to 1000."""
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise InvalidArgument(
            f"page_size must be 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}, not {page_size}",
            reason="PAGE_SIZE_INVALID",
            field="page_size",
        )
    return page_size or DEFAULT_PAGE_SIZE


def one_page(collection: str, found: Sequence[T], size: int, key: Callable[[T], str]) -> tuple[Sequence[T], str]:
    """Of up to `size` + 1 entries those of this page, and the token of the page that follows ("": there is none)."""
    return found[:size], page_token(collection, key(found[size - 1])) if len(found) > size else ""


def page_token(collection: str, last: str) -> str:
    """Token for the page of `collection` that follows the entry with key `last`."""
    return base64.urlsafe_b64encode(_check(collection, last.encode()) + last.encode()).decode().rstrip("=")


def page_after(collection: str, token: str, keys: re.Pattern[str] = re.compile(".+", re.DOTALL)) -> str | None:
    """The key that `token` was made from; None for "". Raises InvalidArgument naming page_token for anything else.

    `keys` matches every key that the listing has.
    The check bytes find tokens that were cut, mixed up between listings or made up; they guard no secret.
    """
    if not token:
        return None
    try:
        data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        key = data[_CHECK_BYTES:].decode()
    except (binascii.Error, ValueError):
        key, data = "", b""
    if not keys.fullmatch(key) or data[:_CHECK_BYTES] != _check(collection, key.encode()):
        raise InvalidArgument(
            "page_token is not one that this listing gave; leave it empty to begin at the first page",
            reason="PAGE_TOKEN_INVALID",
            field="page_token",
        )
    return key


def _check(collection: str, key: bytes) -> bytes:
    return hashlib.sha256(collection.encode() + b"\0" + key).digest()[:_CHECK_BYTES]
