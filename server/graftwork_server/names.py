"""Ids and names: how they look, what is accepted, how a new one is made.

    id                      adapters: as their owners say; data sets: of their content; jobs: random
    model (Generate, ...)   "base", "{adapter id}", "{adapter id}@latest", "{adapter id}@{version}"
    resource name           "adapters/{id}", "adapters/{id}/versions/{n}", "datasets/{id}", "tuningJobs/{id}",
                            "strategies/{id}"

Whatever does not match to the last character is refused here, so that nothing behind ever sees a name with a path,
a control character or a surprise in it.
"""

from __future__ import annotations

import re
import secrets

from graftwork_server.errors import InvalidArgument

BASE = "base"
"""The name under which the base model itself answers."""

LATEST = "latest"
"""In the place of a version's number: the newest one."""

ADAPTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of adapters; all patterns here are for fullmatch. BASE is reserved."""

VERSION_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
DATASET_ID = re.compile(r"ds-[0-9a-f]{32}")
JOB_ID = re.compile(r"job-[0-9a-f]{16}")
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
"""Identity of a version's files."""
_ANY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Of what is asked for in requests: an id of another form is one that is not there."""


def dataset_id_of(sha256: str) -> str:
    """The id of a data set whose bytes have this SHA-256, hexadecimal."""
    return f"ds-{sha256[:32]}"


def new_job_id() -> str:
    """An id that no job has had."""
    return f"job-{secrets.token_hex(8)}"


def version_name(adapter_id: str, number: int) -> str:
    """Resource name of a version."""
    return f"adapters/{adapter_id}/versions/{number}"


def check_adapter_id(adapter_id: str, field: str) -> None:
    """Raises InvalidArgument (ADAPTER_ID_INVALID) naming `field` unless an adapter may have this id."""
    if adapter_id == BASE:
        raise InvalidArgument(
            f'the id "{BASE}" is reserved: it always means the base model; an adapter has another id',
            reason="ADAPTER_ID_INVALID",
            field=field,
        )
    if not ADAPTER_ID.fullmatch(adapter_id):
        raise InvalidArgument(
            f"{adapter_id[:100]!r} is no adapter id; it has 1 to 64 of a-z, A-Z, 0-9, '.', '_' and '-', the first a "
            "letter or digit",
            reason="ADAPTER_ID_INVALID",
            field=field,
        )


def parse_model(model: str, field: str = "model") -> tuple[str, int | None]:
    """Adapter id and version number (None: newest) of "id", "id@latest" or "id@version".

    Raises InvalidArgument naming `field`.
    """
    adapter_id, at, number = model.partition("@")
    if not model:
        raise InvalidArgument(f'give "{BASE}", an adapter id or "id@version"', reason="ADAPTER_ID_INVALID", field=field)
    check_adapter_id(adapter_id, field)
    if not at or number == LATEST:
        return adapter_id, None
    if not VERSION_NUMBER.fullmatch(number):
        raise InvalidArgument(
            f'{number[:20]!r} is no version number; versions count from 1, and "{LATEST}" is the newest',
            reason="VERSION_INVALID",
            field=field,
        )
    return adapter_id, int(number)


def parse_adapter_or_version(name: str, field: str = "name") -> tuple[str, int | None]:
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


def parse_version(name: str, field: str = "name") -> tuple[str, int]:
    """Id and number of "adapters/{id}/versions/{n}": what is deleted is named by its number."""
    found, number = parse_adapter_or_version(name, field)
    if number is None:
        raise _invalid(f'{name[:120]!r} names no version by its number; "adapters/{found}/versions/3" does', field)
    return found, number


def parse_adapter(name: str, field: str = "name") -> str:
    """Id of "adapters/{id}"."""
    found, version = parse_adapter_or_version(name, field)
    if version is not None or name.count("/") > 1:
        raise _invalid(f'{name[:120]!r} names one version; "adapters/{found}" is accepted', field)
    return found


def parse_dataset(name: str, field: str) -> str:
    """Id of "datasets/{id}"."""
    return _single("datasets", name, field)


def parse_job(name: str, field: str = "name") -> str:
    """Id of "tuningJobs/{id}"."""
    return _single("tuningJobs", name, field)


def parse_strategy(name: str, field: str = "name") -> str:
    """Id of "strategies/{id}"."""
    return _single("strategies", name, field)


def _single(collection: str, name: str, field: str) -> str:
    prefix, _, rest = name.partition("/")
    if prefix != collection or not _ANY_ID.fullmatch(rest):
        raise _invalid(f'{name[:120]!r} is not of the form "{collection}/{{id}}"', field)
    return rest


def _invalid(message: str, field: str) -> InvalidArgument:
    return InvalidArgument(message, reason="INVALID_NAME", field=field)
