"""The part of a transaction that gives a name its next version: what uploads and tuning jobs have in common."""

from __future__ import annotations

import json

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from graftwork_server.errors import AlreadyExists
from graftwork_server.hub.database.connection import now
from graftwork_server.hub.database.records import NewVersion, VersionRecord
from graftwork_server.hub.database.tables import Adapter, DeletedAdapter, Job, Version
from graftwork_server.types import JobState

FINAL = [state.value for state in JobState if state.final]


def newest_version(session: Session, adapter_id: str) -> Version | None:
    """What the name serves; None if there is no such adapter."""
    query = select(Version).where(Version.adapter_id == adapter_id).order_by(Version.number.desc()).limit(1)
    return session.scalar(query)


def check_target(session: Session, adapter_id: str, *, may_exist: bool, field: str) -> None:
    """Raises AlreadyExists (ADAPTER_EXISTS), naming `field`, where publishing would replace what nobody wants replaced.

    That is a version, unless `may_exist`, and a version that an unfinished job will publish, unless both say so.
    """
    newest = newest_version(session, adapter_id)
    if newest is not None:
        if may_exist:
            return
        raise AlreadyExists(
            f"adapter {adapter_id!r} exists (version {newest.number}); set new_version (--new-version) to publish its "
            "next version, which its name then serves, or choose another id",
            reason="ADAPTER_EXISTS",
            field=field,
        )
    for job_id, spec in session.execute(select(Job.id, Job.spec).where(Job.state.not_in(FINAL))):
        promised = json.loads(spec)
        if promised["adapter_id"] == adapter_id and not (may_exist and promised.get("new_version", True)):
            raise AlreadyExists(
                f"tuning job {job_id} is about to publish adapter {adapter_id!r}; wait for its end, cancel it, or "
                "choose another id",
                reason="ADAPTER_EXISTS",
                field=field,
                metadata={"tuning_job": job_id},
            )


def insert_version(session: Session, new: NewVersion) -> VersionRecord:
    """The next version of an adapter, which is created with its first one; the newest if that has the same files.

    A number is given once: a deleted adapter's successor goes on counting.
    """
    newest = newest_version(session, new.adapter_id)
    if newest is not None and newest.digest == new.digest:
        return version_record(newest)
    adapter = session.get(Adapter, new.adapter_id)
    if adapter is None:
        deleted = session.get(DeletedAdapter, new.adapter_id)
        adapter = Adapter(id=new.adapter_id, next_number=deleted.next_number if deleted else 1, create_time=now())
        session.add(adapter)
        session.flush()
    row = Version(
        number=adapter.next_number,
        create_time=now(),
        pinned=False,
        follows=newest.number if newest is not None else 0,
        **msgspec.structs.asdict(new),
    )
    adapter.next_number += 1
    session.add(row)
    return version_record(row)


def version_record(row: Version) -> VersionRecord:
    """`row` as plain data."""
    return VersionRecord(**{name: getattr(row, name) for name in VersionRecord.__struct_fields__})
