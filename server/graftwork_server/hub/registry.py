"""Adapters, versions and answered requests: what the database knows about the store's files. Blocking."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from graftwork_server.errors import InvalidArgument, NotFound
from graftwork_server.hub.database.connection import Database, now
from graftwork_server.hub.database.pages import check_page_size, one_page, page_after
from graftwork_server.hub.database.records import NewVersion, VersionRecord
from graftwork_server.hub.database.tables import Adapter, DeletedAdapter, Request, Version
from graftwork_server.hub.publishing import check_target, insert_version, newest_version, version_record
from graftwork_server.names import VERSION_NUMBER, check_adapter_id, parse_version

_MOST_REMEMBERED = 10_000
_REQUEST_ID = re.compile(r"[!-~]{1,64}")


class RequestKey(msgspec.Struct, frozen=True):
    """A create call that may be repeated. fingerprint: of what was asked for, see request_key."""

    method: str
    request_id: str
    fingerprint: str


def request_key(method: str, request_id: str, content: Any) -> RequestKey | None:
    """The key of a call with this content (plain data); None without an id. Raises InvalidArgument for a bad id."""
    if not request_id:
        return None
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidArgument(
            "a request_id has 1 to 64 visible ASCII characters", reason="REQUEST_ID_INVALID", field="request_id"
        )
    text = json.dumps(msgspec.to_builtins(content), sort_keys=True)
    return RequestKey(method, request_id, hashlib.sha256(text.encode()).hexdigest())


class Registry:
    """Adapters, versions and requests.

    Every request of an adapter asks for its version, so the versions read last are remembered until this process writes
    to the database. No other process does: a data directory belongs to one server.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._remembered = _Remembered(0)

    # ------------------------------------------------------------------------------------------ adapters

    def add_version(
        self, new: NewVersion, *, adapter_may_exist: bool, request: RequestKey | None = None
    ) -> VersionRecord:
        """Publishes a version, or gives the newest one if that has the same files.

        Raises AlreadyExists (ADAPTER_EXISTS) if it may be the first one only, and is not, or if a job will publish it.
        Two calls with the same request add one version; both get it.
        """
        with self._database.write() as session:
            if request is not None and (resource := recall(session, request)) is not None:
                return _version_by_name(session, resource)
            check_target(session, new.adapter_id, may_exist=adapter_may_exist, field="upload.adapter_id")
            version = insert_version(session, new)
            if request is not None:
                remember(session, request, version.name)
            return version

    def check_target(self, adapter_id: str, *, may_exist: bool) -> None:
        """Raises AlreadyExists (ADAPTER_EXISTS) early, before bytes are sent for nothing."""
        with self._database.read() as session:
            check_target(session, adapter_id, may_exist=may_exist, field="upload.adapter_id")

    def get_version(self, adapter_id: str, number: int | None = None, field: str = "name") -> VersionRecord:
        """A version, the newest by default. Raises NotFound (ADAPTER_NOT_FOUND, VERSION_NOT_FOUND)."""
        check_adapter_id(adapter_id, field)
        remembered = self._current()
        with self._database.read() as session:
            query = select(Version).where(Version.adapter_id == adapter_id).order_by(Version.number.desc()).limit(1)
            row = session.scalar(query if number is None else query.where(Version.number == number))
            if row is not None:
                return remembered.keep(number, version_record(row))
            raise _version_not_found(session, adapter_id, number, field)

    def recent_version(self, adapter_id: str, number: int | None = None) -> VersionRecord | None:
        """As get_version if it is remembered, else None. Does not block."""
        return self._current().versions.get((adapter_id, number))

    def was_published(self, digest: str) -> bool:
        """Whether a version with this digest is remembered. Does not block."""
        return digest in self._current().digests

    def _current(self) -> _Remembered:
        writes = self._database.writes
        if self._remembered.writes != writes:
            self._remembered = _Remembered(writes)
        return self._remembered

    def list_adapters(self, page_size: int = 0, token: str = "") -> tuple[Sequence[VersionRecord], str]:
        """The newest version of each adapter by id, and the next page's token ("": there is none)."""
        size, after = check_page_size(page_size), page_after("adapters", token)
        newest = select(Version.adapter_id, func.max(Version.number).label("number")).group_by(Version.adapter_id)
        if after is not None:
            newest = newest.where(Version.adapter_id > after)
        page = newest.order_by(Version.adapter_id).limit(size + 1).subquery()
        query = (
            select(Version)
            .join(page, (Version.adapter_id == page.c.adapter_id) & (Version.number == page.c.number))
            .order_by(Version.adapter_id)
        )
        with self._database.read() as session:
            found = [version_record(row) for row in session.scalars(query)]
        return one_page("adapters", found, size, lambda version: version.adapter_id)

    def list_versions(
        self, adapter_id: str, page_size: int = 0, token: str = ""
    ) -> tuple[Sequence[VersionRecord], str]:
        """An adapter's versions, newest first, and the next page's token. Raises NotFound (ADAPTER_NOT_FOUND)."""
        collection = f"adapters/{adapter_id}/versions"
        size, before = check_page_size(page_size), page_after(collection, token, VERSION_NUMBER)
        query = select(Version).where(Version.adapter_id == adapter_id).order_by(Version.number.desc()).limit(size + 1)
        if before is not None:
            query = query.where(Version.number < int(before))
        with self._database.read() as session:
            if session.get(Adapter, adapter_id) is None:
                raise adapter_not_found(adapter_id, session.scalars(select(Adapter.id)).all(), "parent")
            found = [version_record(row) for row in session.scalars(query)]
        return one_page(collection, found, size, lambda version: str(version.number))

    def delete_adapter(self, adapter_id: str) -> list[VersionRecord]:
        """Forgets an adapter and gives the versions that it had. Raises NotFound (ADAPTER_NOT_FOUND)."""
        check_adapter_id(adapter_id, "name")
        with self._database.write(makes_room=True) as session:
            adapter = session.get(Adapter, adapter_id)
            if adapter is None:
                raise adapter_not_found(adapter_id, session.scalars(select(Adapter.id)).all(), "name")
            rows = session.scalars(select(Version).where(Version.adapter_id == adapter_id).order_by(Version.number))
            versions = [version_record(row) for row in rows]
            _forget_adapter(session, adapter)
            return versions

    def delete_version(self, adapter_id: str, number: int) -> tuple[VersionRecord, int]:
        """Forgets a version and gives it, and the number that is the newest now; an adapter goes with its last (0).

        Raises NotFound (ADAPTER_NOT_FOUND, VERSION_NOT_FOUND).
        """
        with self._database.write(makes_room=True) as session:
            row = session.get(Version, (adapter_id, number))
            if row is None:
                raise _version_not_found(session, adapter_id, number, "name")
            version = version_record(row)
            session.delete(row)
            session.flush()
            newest = newest_version(session, adapter_id)
            if newest is None:
                _forget_adapter(session, session.get_one(Adapter, adapter_id))
            return version, newest.number if newest is not None else 0

    def set_pinned(self, version: VersionRecord, pinned: bool) -> VersionRecord:
        """Pins or unpins a version. Raises NotFound (VERSION_NOT_FOUND) if it was deleted since."""
        with self._database.write(makes_room=not pinned) as session:
            row = session.get(Version, (version.adapter_id, version.number))
            if row is None:
                raise NotFound(f"{version.name} was deleted just now", reason="VERSION_NOT_FOUND", field="name")
            row.pinned = pinned
            return version_record(row)

    def pinned_versions(self) -> list[VersionRecord]:
        """Versions that are kept on the device."""
        with self._database.read() as session:
            rows = session.scalars(select(Version).where(Version.pinned).order_by(Version.adapter_id, Version.number))
            return [version_record(row) for row in rows]

    def versions_of(self, digests: Collection[str]) -> list[VersionRecord]:
        """Versions that have one of these digests, by adapter and number."""
        query = select(Version).where(Version.digest.in_(digests)).order_by(Version.adapter_id, Version.number)
        with self._database.read() as session:
            return [version_record(row) for row in session.scalars(query)]

    def adapter_count(self) -> int:
        """How many adapters there are."""
        with self._database.read() as session:
            return session.scalar(select(func.count()).select_from(Adapter)) or 0

    def digests(self) -> set[str]:
        """Digests of all versions."""
        with self._database.read() as session:
            return set(session.scalars(select(Version.digest).distinct()))

    def is_published(self, digest: str) -> bool:
        """Whether any version has this digest."""
        with self._database.read() as session:
            return session.scalar(select(Version.number).where(Version.digest == digest).limit(1)) is not None

    # ------------------------------------------------------------------------------------------ requests

    def find_request(self, request: RequestKey | None) -> VersionRecord | None:
        """What this request created before. Raises as recall does, and NotFound if it was deleted since."""
        if request is None:
            return None
        with self._database.read() as session:
            resource = recall(session, request)
            return None if resource is None else _version_by_name(session, resource)


class _Remembered:
    """Versions read since the last write. What is read while one is made is kept in vain: it is asked for no more."""

    def __init__(self, writes: int) -> None:
        self.writes = writes
        self.versions: dict[tuple[str, int | None], VersionRecord] = {}
        """By adapter id and the number that was asked for, None for the newest."""
        self.digests: set[str] = set()

    def keep(self, number: int | None, version: VersionRecord) -> VersionRecord:
        if len(self.versions) >= _MOST_REMEMBERED:
            self.versions.clear()
            self.digests.clear()
        self.versions[version.adapter_id, number] = version
        self.digests.add(version.digest)
        return version


# What other transactions of the hub are made of.


def recall(session: Session, request: RequestKey) -> str | None:
    """What `request` created before. Raises InvalidArgument (REQUEST_ID_REUSED) if it asked for another thing."""
    row = session.get(Request, (request.method, request.request_id))
    if row is None:
        return None
    if row.fingerprint != request.fingerprint:
        raise InvalidArgument(
            f"request_id {request.request_id!r} was used before for another request; take a new one",
            reason="REQUEST_ID_REUSED",
            field="request_id",
        )
    return row.resource


def remember(session: Session, request: RequestKey, resource: str) -> None:
    """Notes that `request` created `resource`."""
    session.add(
        Request(
            method=request.method,
            request_id=request.request_id,
            fingerprint=request.fingerprint,
            resource=resource,
            create_time=now(),
        )
    )


def _forget_adapter(session: Session, adapter: Adapter) -> None:
    """Removes an adapter with what versions it has; its numbers are not given again."""
    session.merge(DeletedAdapter(id=adapter.id, next_number=adapter.next_number))
    session.execute(delete(Adapter).where(Adapter.id == adapter.id))


def _version_not_found(session: Session, adapter_id: str, number: int | None, field: str) -> NotFound:
    newest = newest_version(session, adapter_id)
    if newest is None:
        return adapter_not_found(adapter_id, session.scalars(select(Adapter.id)).all(), field)
    return NotFound(
        f"adapter {adapter_id!r} has no version {number}; its newest is {newest.number}",
        reason="VERSION_NOT_FOUND",
        field=field,
    )


def adapter_not_found(adapter_id: str, known: Sequence[str], field: str) -> NotFound:
    """The error for an unknown adapter; it names up to three with similar ids."""
    close = difflib.get_close_matches(adapter_id, known, n=3)
    hint = f"; similar: {', '.join(close)}" if close else ""
    return NotFound(f"there is no adapter {adapter_id!r}{hint}", reason="ADAPTER_NOT_FOUND", field=field)


def _version_by_name(session: Session, name: str) -> VersionRecord:
    row = session.get(Version, parse_version(name))
    if row is None:
        raise NotFound(
            f"{name}, which this request created, was deleted since", reason="VERSION_NOT_FOUND", field="request_id"
        )
    return version_record(row)
