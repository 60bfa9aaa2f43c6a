"""Resource names: "adapters/{id}", "adapters/{id}/versions/{n}", "datasets/{id}", "tuningJobs/{id}", "strategies/{id}".

Whatever does not match to the last character is refused here, so that nothing behind ever sees a name with a path,
a control character or a surprise in it.
"""

from __future__ import annotations

import base64
import binascii
import re

from graftwork_server.errors import InvalidArgument
from graftwork_server.types import ADAPTER_ID, BASE

_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_adapter_id(adapter_id: str, field: str) -> str:
    """`adapter_id` if it may name an adapter; InvalidArgument (INVALID_NAME) otherwise."""
    if not ADAPTER_ID.fullmatch(adapter_id):
        raise _invalid(
            f"{adapter_id[:80]!r} is no adapter id; 1 to 64 of a-z, A-Z, 0-9, '.', '_' and '-' are accepted, the first "
            "a letter or digit",
            field,
        )
    if adapter_id == BASE:
        raise _invalid(f'"{BASE}" always means the base model; choose another id', field)
    return adapter_id


def adapter_version(name: str, field: str = "name") -> tuple[str, int | None]:
    """Id and version of "adapters/{id}" (None: the newest) or "adapters/{id}/versions/{n}"."""
    parts = name.split("/")
    if parts[0] != "adapters" or len(parts) not in (2, 4):
        raise _invalid(
            f'{name[:120]!r} is not of the form "adapters/{{id}}" or "adapters/{{id}}/versions/{{n}}"', field
        )
    adapter_id = check_adapter_id(parts[1], field)
    if len(parts) == 2:
        return adapter_id, None
    if parts[2] != "versions" or not _VERSION.fullmatch(parts[3]):
        raise _invalid(f'{name[:120]!r} is not of the form "adapters/{{id}}/versions/{{n}}", n from 1', field)
    return adapter_id, int(parts[3])


def adapter_id(name: str, field: str = "name") -> str:
    """Id of "adapters/{id}"."""
    found, version = adapter_version(name, field)
    if version is not None:
        raise _invalid(f'{name[:120]!r} names one version; "adapters/{found}" is accepted', field)
    return found


def dataset_id(name: str, field: str) -> str:
    """Id of "datasets/{id}"."""
    return _single("datasets", name, field)


def job_id(name: str, field: str = "name") -> str:
    """Id of "tuningJobs/{id}"."""
    return _single("tuningJobs", name, field)


def strategy_id(name: str, field: str = "name") -> str:
    """Id of "strategies/{id}"."""
    return _single("strategies", name, field)


def page_token(last: str) -> str:
    """A token for the page after the entry with key `last`."""
    return base64.urlsafe_b64encode(last.encode()).decode().rstrip("=")


def page_after(token: str) -> str:
    """The key that `page_token` was made from, "" for the first page. Raises InvalidArgument for any other text."""
    try:
        return base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise _invalid("is no next_page_token of an earlier answer", "page_token") from None


def _single(collection: str, name: str, field: str) -> str:
    prefix, _, rest = name.partition("/")
    if prefix != collection or not _ID.fullmatch(rest):
        raise _invalid(f'{name[:120]!r} is not of the form "{collection}/{{id}}"', field)
    return rest


def _invalid(message: str, field: str) -> InvalidArgument:
    return InvalidArgument(message, reason="INVALID_NAME", field=field)
