"""Resource names: "adapters/{id}", "adapters/{id}/versions/{n}", "datasets/{id}", "tuningJobs/{id}", "strategies/{id}".

Whatever does not match to the last character is refused here, so that nothing behind ever sees a name with a path,
a control character or a surprise in it.
"""

from __future__ import annotations

import re

from graftwork_server.errors import InvalidArgument
from graftwork_server.hub.registry import VERSION_NUMBER, check_adapter_id
from graftwork_server.types import LATEST

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def adapter_version(name: str, field: str = "name") -> tuple[str, int | None]:
    """Id and version of "adapters/{id}" or ".../versions/latest" (None: the newest), or ".../versions/{n}"."""
    parts = name.split("/")
    if parts[0] != "adapters" or len(parts) not in (2, 4):
        raise _invalid(
            f'{name[:120]!r} is not of the form "adapters/{{id}}" or "adapters/{{id}}/versions/{{n}}"', field
        )
    check_adapter_id(parts[1], field)
    if len(parts) == 2:
        return parts[1], None
    if parts[2] == "versions" and parts[3] == LATEST:
        return parts[1], None
    if parts[2] != "versions" or not VERSION_NUMBER.fullmatch(parts[3]):
        raise _invalid(
            f'{name[:120]!r} is not of the form "adapters/{{id}}/versions/{{n}}", n from 1 or "{LATEST}"', field
        )
    return parts[1], int(parts[3])


def version_name(name: str, field: str = "name") -> tuple[str, int]:
    """Id and number of "adapters/{id}/versions/{n}": what is deleted is named by its number."""
    found, number = adapter_version(name, field)
    if number is None:
        raise _invalid(f'{name[:120]!r} names no version by its number; "adapters/{found}/versions/3" does', field)
    return found, number


def adapter_id(name: str, field: str = "name") -> str:
    """Id of "adapters/{id}"."""
    found, version = adapter_version(name, field)
    if version is not None or name.count("/") > 1:
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


def _single(collection: str, name: str, field: str) -> str:
    prefix, _, rest = name.partition("/")
    if prefix != collection or not _ID.fullmatch(rest):
        raise _invalid(f'{name[:120]!r} is not of the form "{collection}/{{id}}"', field)
    return rest


def _invalid(message: str, field: str) -> InvalidArgument:
    return InvalidArgument(message, reason="INVALID_NAME", field=field)
